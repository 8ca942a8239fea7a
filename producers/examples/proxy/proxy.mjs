// A proxy between a shop's pages and tombola's gateway, for Node 18.19 or newer. It needs no package.
//
//     const proxy = drawProxy({ gatewayUrl: 'http://127.0.0.1:8000', apiKey: process.env.GATEWAY_API_KEY, accountOf });
//     app.use('/tombola', proxy);                 // Express: before any body parser
//     http.createServer(proxy).listen(3000);      // or without a framework
//
// The page then draws with `draw(account, { base: '/tombola' })` of draw.js. `accountOf(request)` returns (or resolves
// with) the account of the member who is logged in, or null. The proxy spends that account's points, whatever account the
// browser names, and the API key never leaves the server.

const BODY_BYTES_MAX = 16 * 1024;
const WAIT_S_MAX = 10;
const TIMEOUT_MS = 15_000; // longer than a wait
const PASSED_ON = ['content-type', 'retry-after', 'idempotency-key', 'idempotency-replayed', 'tombola-receipt'];

/** The proxy answers this itself: a status and what to say. */
class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** A request handler for http.createServer, Express or Connect. */
export function drawProxy({ gatewayUrl, apiKey, accountOf }) {
  const gateway = gatewayUrl.replace(/\/+$/, '');

  async function ask(path, init = {}) {
    const headers = { ...init.headers, authorization: `Bearer ${apiKey}` };
    const signal = AbortSignal.timeout(TIMEOUT_MS);
    try {
      const answer = await fetch(gateway + path, { ...init, headers, signal });
      const kept = PASSED_ON.filter((name) => answer.headers.has(name)).map((name) => [name, answer.headers.get(name)]);
      return { status: answer.status, headers: Object.fromEntries(kept), body: await answer.text() };
    } catch {
      throw new Refused(503, 'The gateway does not answer. Send the same request again.');
    }
  }

  async function draw(request, accountId) {
    // A page of another site can send a form along with the member's cookie, but no JSON without being asked.
    const type = (request.headers['content-type'] ?? '').split(';')[0].trim().toLowerCase();
    if (type !== 'application/json') throw new Refused(400, 'Send the body as application/json.');
    const key = request.headers['idempotency-key'] ?? '';
    // A key made here would be a new one, and a new charge, in every repeat.
    if (!/^[A-Za-z0-9._-]{1,64}$/.test(key)) {
      throw new Refused(400, 'The header Idempotency-Key is missing or not valid.');
    }
    const asked = parse(await read(request));
    // The session says who pays: an `account_id` of the browser's is not even read.
    const { campaign, pulls, client_nonce } = asked;
    // The nonce is the browser's: one made here would be another request in every repeat.
    const own = { pulls: pulls ?? undefined, client_nonce: client_nonce ?? undefined };
    const body = JSON.stringify({ account_id: accountId, campaign: campaign || 'default', ...own });
    const headers = { 'content-type': 'application/json', 'idempotency-key': key };
    return ask('/v1/draws', { method: 'POST', headers, body });
  }

  async function show(session, query, accountId) {
    const wait = query.get('wait') ?? '0';
    const waitS = /^\d{1,4}(\.\d{1,3})?$/.test(wait) ? Math.min(Number(wait), WAIT_S_MAX) : 0;
    const answer = await ask(`/v1/draws/${session}?wait=${waitS}`);
    // The API key may see every account's draws, the member only those of one.
    if (answer.status === 200 && JSON.parse(answer.body).account_id !== accountId) {
      throw new Refused(404, 'There is no such lottery session.');
    }
    return answer;
  }

  async function answerTo(request) {
    const accountId = await accountOf(request);
    if (accountId == null) throw new Refused(401, 'Log in first.');
    const [path, query = ''] = request.url.split('?', 2);
    if (request.method === 'POST' && path === '/v1/draws') return draw(request, accountId);
    const found = /^\/v1\/draws\/([A-Za-z0-9._-]{1,100})$/.exec(path);
    if (request.method === 'GET' && found) return show(found[1], new URLSearchParams(query), accountId);
    throw new Refused(404, 'There is nothing at this path.');
  }

  return async (request, response) => {
    const answer = await answerTo(request).catch((error) => {
      const status = error instanceof Refused ? error.status : 500;
      const detail = error instanceof Refused ? error.message : 'A mistake of ours.';
      const body = JSON.stringify({ title: detail, status, detail });
      return { status, headers: { 'content-type': 'application/problem+json' }, body };
    });
    response.writeHead(answer.status, { ...answer.headers, 'cache-control': 'no-store' }).end(answer.body);
  };
}

async function read(request) {
  const pieces = [];
  let bytes = 0;
  for await (const piece of request) {
    bytes += piece.length;
    if (bytes <= BODY_BYTES_MAX) pieces.push(piece); // to stop reading would close the connection before the answer
  }
  if (bytes > BODY_BYTES_MAX) throw new Refused(413, 'The body is larger than it may be.');
  return Buffer.concat(pieces).toString('utf8');
}

function parse(text) {
  let asked = null;
  try {
    asked = JSON.parse(text);
  } catch {
    // told below
  }
  if (asked === null || typeof asked !== 'object' || Array.isArray(asked)) {
    throw new Refused(400, 'The body is not a JSON object.');
  }
  return asked;
}
