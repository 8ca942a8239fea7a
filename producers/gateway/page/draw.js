// Paid draws from a browser, charged once whatever happens. A file to copy, without dependencies.
//
//     import { draw, resume } from './draw.js';
//     resume({ show });          // when the page loads: finishes draws that a reload or a lost connection interrupted
//     await draw(6, { show });   // on a click: account 6 pays for one draw
//
// Key and body are kept in localStorage before they are sent, and forgotten when `show(result)` has resolved. Until then,
// after any unknown outcome the same request is sent again under the same key; the gateway never charges a repeat. One
// tab at a time finishes a draw. IndexedDB records that it is finished: localStorage reaches other tabs late.
//
// The outcome depends on a nonce, which this file makes with the key and keeps in the body: who chooses the key, but not
// the nonce, cannot choose the outcome.

const KEPT = 'tombola.pending.'; // one entry per draw, so that tabs do not overwrite each other's
const FINISHED = 'tombola.finished'; // an IndexedDB with the request keys of the last day
const FINISHED_KEPT_MS = 86_400_000;
const FINISHED_TIMEOUT_MS = 2_000;
const WAIT_S = 10;
const ANSWER_TIMEOUT_MS = 20_000; // against connections that are open and dead
const BACKOFF_MS = { first: 250, max: 8_000 };
const NONCE_BYTES = 16;

/** The gateway refuses this draw. `status` and `problem` are its answer, a problem+json. */
export class DrawRefused extends Error {}

class NoAnswer extends Error {}

/**
 * @typedef {object} Options
 * @property {(result: object) => unknown} [show] shows the result; may be async
 * @property {(what: 'sending' | 'waiting' | 'again' | 'refused', about: { key: string, why?: string, delayMs?: number })
 *   => void} [tell] is called for progress
 * @property {(receipt: string, about: { key: string }) => void} [keep] gets each signed receipt as it comes, where the
 *   gateway signs receipts: of the promise, and before `show` of the result
 * @property {string} [base] the gateway's URL, which must allow this page's origin
 * @property {Record<string, string>} [headers] for every request
 */

/** One paid draw, of one pull or of several at the campaign's price for so many. Resolves with the result; rejects only
 *  if the gateway refuses the draw, or if `show` fails.
 *  @param {number} accountId
 *  @param {{ campaign?: string, pulls?: number } & Options} [options] `GET /v1/campaigns` has the campaigns and the pulls
 *    that each one sells; the campaign `default` takes no `pulls`
 *  @returns {Promise<object>} with `pulls` the result has `prizes`, the outcome of each pull; without, `prize_amount` */
export async function draw(accountId, { campaign, pulls, ...options } = {}) {
  if (!Number.isSafeInteger(accountId) || accountId < 1) throw new RangeError('an account id is a whole number from 1');
  if (pulls !== undefined && !(Number.isSafeInteger(pulls) && pulls >= 1)) {
    throw new RangeError('pulls is a whole number from 1');
  }
  const key = makeKey();
  const body = JSON.stringify({ account_id: accountId, campaign, pulls, client_nonce: randomHex(NONCE_BYTES) });
  localStorage.setItem(KEPT + key, body); // throws where it cannot be kept: then nothing is sent
  return finish({ key, body }, options);
}

/** The draws of all tabs whose result was not shown yet: [{ key, body }], the oldest first. */
export function pending() {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(KEPT));
  return names.sort().map((name) => ({ key: name.slice(KEPT.length), body: localStorage.getItem(name) }));
}

/** Finish the pending draws, with the options of `draw`. Resolves like Promise.allSettled; null for a draw that another
 *  tab finished. */
export const resume = (options) => Promise.allSettled(pending().map((kept) => finish(kept, options)));

function finish({ key, body }, { show = () => {}, tell = () => {}, keep = () => {}, base = '', headers = {} } = {}) {
  return alone(KEPT + key, async () => {
    if (localStorage.getItem(KEPT + key) === null || (await isFinished(key))) return null;
    const result = await settle(key, body, { tell, keep, base, headers }).catch(async (error) => {
      // With these, the request can never be accepted, or (409) the campaign takes no draws now: a player who comes back
      // when it does has not asked again. After any other status, such as 401, the request may be accepted later.
      if ([400, 409, 413, 422].includes(error.status)) await forget(key);
      tell('refused', { key, why: error.message });
      throw error;
    });
    await show(result);
    await forget(key);
    return result;
  });
}

async function settle(key, body, { tell, keep, base, headers }) {
  const typed = { ...headers, 'Content-Type': 'application/json', 'Idempotency-Key': key };
  const ask = async (url, init) => {
    const { answer, receipt } = await fetchAnswer(url, init);
    try {
      if (receipt) keep(receipt, { key });
    } catch (error) {
      reportError(error); // a draw does not fail because its receipt cannot be kept
    }
    return answer;
  };
  for (let backoff = BACKOFF_MS.first; ; backoff = Math.min(2 * backoff, BACKOFF_MS.max)) {
    try {
      tell('sending', { key });
      let answer = await ask(`${base}/v1/draws`, { method: 'POST', headers: typed, body });
      for (let polls = 0; answer.status === 'accepted'; polls += 1) {
        if (polls) await sleep(BACKOFF_MS.first);
        tell('waiting', { key });
        answer = await ask(`${base}/v1/draws/${answer.lottery_session_id}?wait=${WAIT_S}`, { headers });
      }
      return answer;
    } catch (error) {
      if (!(error instanceof NoAnswer)) throw error;
      const delayMs = Math.max(error.retryAfterMs, backoff * (0.5 + Math.random() / 2)); // spreads clients out
      tell('again', { key, delayMs, why: error.problem.title });
      await sleep(delayMs);
    }
  }
}

async function fetchAnswer(url, init) {
  const signal = AbortSignal.timeout(ANSWER_TIMEOUT_MS);
  const response = await fetch(url, { ...init, signal, cache: 'no-store' }).catch(() => null);
  const answer = await response?.json().catch(() => null); // null: interrupted, or a proxy's own text
  if (response?.ok && answer?.status) return { answer, receipt: response.headers.get('Tombola-Receipt') };
  if (!response && (await isClosedToUs(url))) {
    const why = `${new URL(url).origin} allows no requests of pages of ${location.origin}: see TOMBOLA_CORS_ORIGINS`;
    throw Object.assign(new DrawRefused(why), { status: 0, problem: { title: 'another origin', detail: why } });
  }
  const status = response && !response.ok ? response.status : 0;
  const problem = { title: status ? `HTTP ${status}` : 'no answer', ...answer };
  // Only the draw itself can be refused: if its result cannot be read (404, for example), the draw is sent again.
  const isRefused = init.method && status >= 400 && status < 500 && ![408, 425, 429].includes(status);
  const error = new (isRefused ? DrawRefused : NoAnswer)(problem.detail ?? problem.title);
  throw Object.assign(error, { status, problem, retryAfterMs: 1000 * response?.headers.get('Retry-After') || 0 });
}

// Whether a gateway of another origin answers, but not to this page: a repeat would not help then.
async function isClosedToUs(url) {
  if (new URL(url, location.href).origin === location.origin) return false;
  const probe = (mode) => {
    const signal = AbortSignal.timeout(ANSWER_TIMEOUT_MS);
    return fetch(`${url.split('/v1/')[0]}/healthz`, { mode, signal, cache: 'no-store' }).then(() => true, () => false);
  };
  return (await probe('no-cors')) && !(await probe('cors'));
}

// The time comes first, which keeps the ledger's unique index fast.
const makeKey = () => `lottery_req_${Date.now()}_${randomHex(8)}`;

// Not randomUUID: pages on plain http lack it.
function randomHex(bytes) {
  const random = crypto.getRandomValues(new Uint8Array(bytes));
  return Array.from(random, (byte) => byte.toString(16).padStart(2, '0')).join('');
}

// One tab at a time. Pages on plain http have no locks: there two tabs may finish the same draw, which is harmless.
const alone = async (name, work) => (navigator.locks ? navigator.locks.request(name, work) : work());

// Runs before the next tab gets the lock. If IndexedDB does not answer, that tab may send the draw again: harmless, too.
async function forget(key) {
  const write = (store) => {
    store.delete(IDBKeyRange.upperBound(`lottery_req_${Date.now() - FINISHED_KEPT_MS}`));
    return store.put(true, key);
  };
  await inFinished('readwrite', write).catch(() => null);
  localStorage.removeItem(KEPT + key);
}

async function isFinished(key) {
  const isIt = (await inFinished('readonly', (store) => store.count(key)).catch(() => 0)) > 0;
  if (isIt) localStorage.removeItem(KEPT + key); // in case the other tab was closed before it did
  return isIt;
}

const inFinished = (mode, ask) => new Promise((done, fail) => {
  setTimeout(fail, FINISHED_TIMEOUT_MS);
  const opening = indexedDB.open(FINISHED, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(FINISHED);
  opening.onerror = fail;
  opening.onsuccess = () => {
    const transaction = opening.result.transaction(FINISHED, mode);
    const request = ask(transaction.objectStore(FINISHED));
    transaction.onabort = fail;
    transaction.oncomplete = () => {
      opening.result.close();
      done(request.result);
    };
  };
});

const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));
