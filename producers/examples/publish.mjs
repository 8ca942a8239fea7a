// Publishes one draw straight to the broker, the way a Node frontend can: contract v1, or v2 with a client nonce.
//
//     TOMBOLA_BROKER_URL=redis://host:6379/0 node publish.mjs ACCOUNT_ID [REQUEST_KEY [CLIENT_NONCE]]
//     TOMBOLA_BROKER_URL=amqp://user:password@host// node publish.mjs ACCOUNT_ID [REQUEST_KEY [CLIENT_NONCE]]
//
// Copy what is above the line "Command line". It opens a connection per draw, which is plain and slow: a server keeps
// one open and publishes all its draws on it.

import { createHmac, randomBytes, randomInt } from 'node:crypto';
import { realpathSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import amqplib from 'amqplib';
import { createClient } from 'redis';

const QUEUE = 'draws'; // the Stream, the exchange, the queue and the routing key: all have this name
const CONNECT_TIMEOUT_MS = 5_000;
const CONFIRM_TIMEOUT_MS = 10_000;

let sequence = randomInt(1000);

/** A new request key, lottery_req_{timestamp ms}_{8 hex}_{3-digit seq}. It begins with the time: that keeps the
 *  ledger's unique index quick. */
export function makeRequestKey() {
  sequence = (sequence + 1) % 1000;
  return `lottery_req_${Date.now()}_${randomBytes(4).toString('hex')}_${String(sequence).padStart(3, '0')}`;
}

/** The body of `draw`: { request_key, account_id } and, if you like, { lottery_session_id, campaign, client_nonce }.
 *  The nonce is random text that the player's browser made with the key: the outcome depends on it.
 *  What the contract refuses is refused here, where the caller hears of it: a worker can only park it. */
export function makeBody({ request_key, lottery_session_id, account_id, campaign, client_nonce }) {
  if (!/^[A-Za-z0-9._-]{1,64}$/.test(request_key)) {
    throw new Error('a request key is 1 to 64 characters of A-Z a-z 0-9 . _ and -');
  }
  // Beyond the safe integers JavaScript rounds, and another account would pay.
  if (!Number.isSafeInteger(account_id) || account_id < 1) {
    throw new Error(`an account id is an integer from 1 to ${Number.MAX_SAFE_INTEGER}`);
  }
  if (client_nonce != null && !/^[A-Za-z0-9_-]{16,64}$/.test(client_nonce)) {
    throw new Error('a client nonce is 16 to 64 characters of A-Z a-z 0-9 _ and -');
  }
  const named = { request_key, lottery_session_id: lottery_session_id || request_key };
  const odds = { campaign: campaign ?? 'default' };
  // The canonical forms, which are what a signature covers: no blanks, all fields, in this order.
  if (client_nonce == null) return JSON.stringify({ v: 1, ...named, account_id, ...odds });
  return JSON.stringify({ v: 2, kind: 'draw', account_id, ...named, ...odds, client_nonce });
}

/** The signature of a canonical body under TOMBOLA_MESSAGE_SECRET (hex digits; of several, with commas, the first). */
export function sign(body, secret) {
  return createHmac('sha256', Buffer.from(secret.split(',')[0].trim(), 'hex')).update(body).digest('hex');
}

/** Publish `draw`, signed if there is a `secret`; resolves when the broker has confirmed it. When it rejects, the
 *  broker may have the draw or not: publish the same one again, under the same request key. A second copy does no
 *  harm. */
export async function publish(url, draw, secret = '') {
  const body = makeBody(draw);
  const beside = secret ? { signature: sign(body, secret) } : {};
  await (/^rediss?:/.test(url) ? publishToRedis(url, body, beside) : publishToRabbitMQ(url, body, beside));
}

async function publishToRedis(url, body, beside) {
  const client = createClient({
    url,
    // Not reconnecting: it is the caller who decides whether to send again.
    socket: { connectTimeout: CONNECT_TIMEOUT_MS, socketTimeout: CONFIRM_TIMEOUT_MS, reconnectStrategy: false },
  });
  client.on('error', () => {}); // without a listener it would end the process; what awaits below is told as well
  try {
    await client.connect();
    // XADD makes the Stream if need be. The workers make their group, from its first entry: none is skipped.
    await client.xAdd(QUEUE, '*', { body, ...beside });
  } finally {
    if (client.isOpen) client.destroy();
  }
}

async function publishToRabbitMQ(url, body, beside) {
  const connection = await amqplib.connect(url, { timeout: CONNECT_TIMEOUT_MS });
  connection.on('error', () => {}); // as above: a connection that breaks closes its channel, and that rejects
  let timer;
  const timeout = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error('RabbitMQ did not confirm it in time')), CONFIRM_TIMEOUT_MS);
  });
  try {
    await Promise.race([publishConfirmed(connection, body, beside), timeout]);
  } finally {
    clearTimeout(timer);
    connection.close().catch(() => {}); // not awaited: the answer is known, and a stuck broker would not answer this
  }
}

async function publishConfirmed(connection, body, headers) {
  const channel = await connection.createConfirmChannel();
  // Nothing is declared here: RabbitMQ refuses a declaration whose arguments differ in a letter from the workers'
  // (producers/brokers/streams.py), so it is left to them. Where they have not been yet, the broker says so: without the
  // exchange it closes the channel, and `mandatory` makes it return what finds no queue. (The confirm alone would not
  // do: a message that no queue wants is confirmed as well, right after its return.)
  await new Promise((resolve, reject) => {
    const noQueue = new Error('there is no queue `draws` on this broker yet: start a worker first');
    channel.on('error', (error) => reject(error.code === 404 ? noQueue : error));
    channel.on('return', () => reject(noQueue));
    channel.publish(
      QUEUE,
      QUEUE,
      Buffer.from(body),
      { mandatory: true, persistent: true, contentType: 'application/json', contentEncoding: 'utf-8', headers },
      (refused) => (refused ? reject(new Error(`RabbitMQ did not confirm it: ${refused.message}`)) : resolve()),
    );
  });
}

// Command line.

const USAGE = 'TOMBOLA_BROKER_URL=redis://... (or amqp://...) node publish.mjs ACCOUNT_ID [REQUEST_KEY [CLIENT_NONCE]]';

async function main([accountId, request_key = makeRequestKey(), client_nonce = undefined, ...rest]) {
  const url = process.env.TOMBOLA_BROKER_URL;
  if (!url || !accountId || rest.length) throw new Error(`usage: ${USAGE}`);
  const draw = { request_key, account_id: /^[0-9]+$/.test(accountId) ? Number(accountId) : NaN, client_nonce };
  makeBody(draw); // a draw that cannot be is refused before its key is shown
  // First the key, then the draw: whoever dies in between can send the same again. A frontend saves it here.
  console.log(request_key);
  await publish(url, draw, process.env.TOMBOLA_MESSAGE_SECRET);
  console.log('confirmed: the broker has the draw');
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  main(process.argv.slice(2)).catch((error) => {
    // A name with several addresses fails with several errors and no message of its own.
    console.error(`not published: ${(error.message || error.code || String(error)).split('\n')[0]}`);
    process.exit(1); // at once: a connection in trouble may have more to wait for
  });
}
