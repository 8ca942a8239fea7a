// A receiver of tombola's webhooks, for Node 18.19 or newer. It needs no package.
//
//     const receiver = webhookReceiver({ secrets: process.env.WEBHOOK_SECRETS.split(' '), once: onceIn('received', ship) });
//     app.post('/webhooks/tombola', receiver);    // Express: before any body parser
//     http.createServer(receiver).listen(3000);   // or without a framework
//
// It takes what is signed with one of the secrets (`whsec_…`; two while a secret is rotated) and not older than five
// minutes, and acts once for each idempotency key, however often a message comes. It answers 204 when the act is done and
// kept; for any other answer tombola sends the same message again, later.
//
// The signature is that of the Standard Webhooks specification: their libraries check it as well.

import { createHmac, timingSafeEqual } from 'node:crypto';
import { access, mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';

const BODY_BYTES_MAX = 256 * 1024;
const AGE_S_MAX = 300; // of a message, in either direction: a message that was overheard is of no use later

/** The receiver does not take this message: a status, and what to say. */
class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** A request handler for http.createServer, Express or Connect. `once(key, event)` acts unless it has under that key. */
export function webhookReceiver({ secrets, once }) {
  const keys = secrets.map((secret) => Buffer.from(secret.replace(/^whsec_/, ''), 'base64'));

  function isSigned(message, header) {
    const sent = header.split(' ').filter((it) => it.startsWith('v1,'));
    const ours = keys.map((key) => Buffer.from(`v1,${createHmac('sha256', key).update(message).digest('base64')}`));
    return sent.some((it) => ours.some((own) => isEqual(Buffer.from(it), own)));
  }

  async function checked(request) {
    if (request.method !== 'POST') throw new Refused(405, 'Send a POST.');
    // The bytes as they came: the same JSON written anew has another signature.
    const body = await read(request);
    const { 'webhook-id': id = '', 'webhook-timestamp': timestamp = '' } = request.headers;
    if (!id || !/^\d{1,12}$/.test(timestamp)) throw new Refused(400, 'Webhook-Id or Webhook-Timestamp is missing.');
    const message = Buffer.concat([Buffer.from(`${id}.${timestamp}.`), body]);
    if (!isSigned(message, request.headers['webhook-signature'] ?? '')) {
      throw new Refused(401, 'The signature is not right.');
    }
    if (Math.abs(Date.now() / 1000 - Number(timestamp)) > AGE_S_MAX) {
      throw new Refused(401, "The timestamp is too far from this server's clock.");
    }
    return JSON.parse(body.toString('utf8')); // signed, so it is tombola's
  }

  return async (request, response) => {
    try {
      const event = await checked(request);
      await once(event.idempotency_key, event);
      response.writeHead(204).end();
    } catch (error) {
      const status = error instanceof Refused ? error.status : 500;
      response.writeHead(status, { 'content-type': 'text/plain' });
      response.end(error instanceof Refused ? error.message : 'A mistake of ours.');
    }
  };
}

/**
 * Acts once for each key, and remembers keys as files in `folder`. In a shop the keys are a table of its own database, in
 * one transaction with what `act` writes: here a crash between the act and its file makes the act happen again.
 */
export function onceIn(folder, act) {
  const underWay = new Map(); // a message may come again while the first one is still handled

  async function run(key, event) {
    await mkdir(folder, { recursive: true });
    const file = join(folder, encodeURIComponent(key));
    const isKnown = await access(file).then(
      () => true,
      () => false,
    );
    if (isKnown) return;
    await act(event);
    await writeFile(file, '');
  }

  return async (key, event) => {
    const earlier = underWay.get(key) ?? Promise.resolve();
    const mine = earlier.catch(() => {}).then(() => run(key, event));
    underWay.set(key, mine);
    try {
      await mine;
    } finally {
      if (underWay.get(key) === mine) underWay.delete(key);
    }
  };
}

function isEqual(a, b) {
  return a.length === b.length && timingSafeEqual(a, b);
}

async function read(request) {
  const pieces = [];
  let bytes = 0;
  for await (const piece of request) {
    bytes += piece.length;
    if (bytes <= BODY_BYTES_MAX) pieces.push(piece); // to stop reading would close the connection before the answer
  }
  if (bytes > BODY_BYTES_MAX) throw new Refused(413, 'The body is larger than it may be.');
  return Buffer.concat(pieces);
}
