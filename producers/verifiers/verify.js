// Verify a draw from its proof, offline: WebCrypto and nothing else, in a browser or in Node from version 20 on.
//
//     import { verify } from './verify.js';
//     const report = await verify(text, { anchor, keys, booksKey, receipts });
//
// A proof comes from `tombola proof SESSION` or `GET /v1/draws/{session}/proof`. Each of its claims is proven, not
// provable yet, or false. What a proof names (keys, anchor) is its operator's word: compare it with what was published
// before the draw, by the second argument, or by eye. All of its fields are text, and may be left out; `receipts` is a
// list.
//
// This file is written from the formats (producers/docs/verifiable.md), not from the code that draws. verify.py says
// the same with Python alone, word for word. Integers of more than 53 bits are texts or BigInts here.

const PROVEN = 'proven', NOT_YET = 'not provable yet', FALSE = 'false';
const UNCHECKED = 'The signature was not checked: this program cannot check Ed25519 here. ';

/** The claim is false. */
class Wrong extends Error {}
/** The claim cannot be proven with what the proof has. */
class NotYet extends Error {}
/** This is no proof that can be read. */
export class NoProof extends Error {}

function must(condition, words) {
  if (!condition) throw new Wrong(words);
}

// ---- the form of a proof -------------------------------------------------------------------------------------------

const HASH = '[0-9a-f]{64}';
const ID = '[1-9][0-9]{0,18}';
const KEY = '[A-Za-z0-9._-]{1,100}';
const NAME = '[A-Za-z0-9._:/-]{1,200}';
const AMOUNT = '(?:0|[1-9][0-9]{0,17})\\.[0-9]{2}';
const MOMENT = '[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{6}Z';
const ROW_TIME = '[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{6}';
const JWS = '[A-Za-z0-9_-]+\\.[A-Za-z0-9_-]+\\.[A-Za-z0-9_-]+';
const EPOCH = '(?:0|[1-9][0-9]{0,5})\\.(?:0|[1-9][0-9]{0,5})';
const TEXT = '[\\s\\S]*'; // any text
const CODE = '[A-Za-z0-9_-]{1,40}';

// A form is the pattern of a text, a whole number, or true. `orNull`: it may be null. A list has any number of the form
// in it. A field with ? may be absent; a field with * stands for any number of fields that its pattern names.
const NUMBER = '#number', TRUE = '#true';
const orNull = (form) => ({ orNull: form });
class Fields {
  constructor(forms) {
    this.forms = new Map(Object.entries(forms));
  }
}
const fields = (forms) => new Fields(forms);

const ROW = fields({
  transaction_id: ID, account_id: ID, delta_amount: `-?${AMOUNT}`, balance_before: AMOUNT, balance_after: AMOUNT,
  created_at: ROW_TIME, updated_at: ROW_TIME, business_id: KEY, lottery_session_id: KEY, idempotency_key: NAME,
  business_type: NAME, asset_code: NAME, notes: orNull(TEXT),
});
const SEALED = fields({
  checkpoint: orNull(TEXT), key: orNull(TEXT), blocks: [fields({ text: TEXT, proof: [HASH] })],
  leaves: [fields({ transaction_id: ID, block: ID, index: '0|[1-9][0-9]{0,8}', proof: [HASH] })],
});
const SEED_EPOCH = fields({
  name: EPOCH, commitment: HASH, opens_at: orNull(MOMENT), closes_at: orNull(MOMENT), revealed_at: orNull(MOMENT),
  secret: orNull('(?:[0-9a-f]{2}){1,512}'), anchor: HASH,
});
const FORM = fields({
  v: NUMBER, request: TEXT, fingerprint: HASH, status: 'accepted|completed|rejected|dead',
  odds: orNull(fields({ hash: HASH, text: TEXT })), epoch: orNull(SEED_EPOCH), rows: [ROW], refund: [ROW],
  result: orNull(TEXT), receipts: fields({ accepted: orNull(JWS), settled: orNull(JWS) }), keys: orNull(TEXT),
  books: orNull(SEALED),
});
const PRIZE = fields({
  code: CODE, weight: NUMBER, '?title': TEXT, '?stock': NUMBER, '?per_account': NUMBER, '?value': AMOUNT,
  '?instead': CODE, '?grants': [fields({ '?asset': KEY, '?amount': AMOUNT, '?codes': TRUE, '?notify': CODE })],
});
const MANIFEST = fields({
  name: KEY, '?title': TEXT, asset: KEY, cost: fields({ '*[1-9][0-9]{0,2}': AMOUNT }), '?opens': TEXT,
  '?closes': TEXT, '?day': TEXT, '?limits': fields({ '?per_day': NUMBER, '?per_account': NUMBER }),
  '?eligibility': fields({ '?deny': KEY, '?allow': KEY }), prize: [PRIZE],
  '?tier': [fields({ name: CODE, spent_from: AMOUNT, weights: fields({ [`*${CODE}`]: NUMBER }) })],
  '?guarantee': [fields({ name: CODE, prizes: [CODE], hard_at: NUMBER, '?soft_from': NUMBER, '?soft_step': NUMBER })],
});

const matched = (pattern, text) => new RegExp(`^(?:${pattern})$`, 'u').exec(text);
const isText = (value, pattern) => typeof value === 'string' && !isBroken(value) && matched(pattern, value) !== null;
const isBroken = (text) => /[\ud800-\udfff]/u.test(text); // half of a character
const isWhole = (value) => Number.isInteger(value) && value >= 0 && value <= 2 ** 32;
const has = (object, name) => Object.hasOwn(object, name);

/** Throw NoProof unless `value` has exactly this form. */
function checkForm(value, form, at) {
  let isRight = true;
  if (form.orNull !== undefined) {
    if (value !== null) checkForm(value, form.orNull, at);
  } else if (form instanceof Fields) {
    isRight = typeof value === 'object' && value !== null && !Array.isArray(value);
    if (isRight) checkFields(value, form.forms, at);
  } else if (Array.isArray(form)) {
    isRight = Array.isArray(value);
    for (const inner of isRight ? value : []) checkForm(inner, form[0], `${at}[]`);
  } else if (form === NUMBER) {
    isRight = isWhole(value);
  } else if (form === TRUE) {
    isRight = value === true;
  } else {
    isRight = isText(value, form);
  }
  if (!isRight) throw new NoProof(`${at} is not as it must be`);
}

/** Throw NoProof unless the object has the fields of the form and no other. */
function checkFields(value, forms, at) {
  const anyName = [...forms.keys()].find((name) => name[0] === '*');
  for (const [name, inner] of Object.entries(value)) {
    let known = forms.get(name) ?? forms.get(`?${name}`);
    if (known === undefined && anyName !== undefined && matched(anyName.slice(1), name)) known = forms.get(anyName);
    if (known === undefined || name[0] === '?' || name[0] === '*') {
      throw new NoProof(`${at} has a field that is not known`);
    }
    checkForm(inner, known, `${at}.${name}`);
  }
  for (const name of forms.keys()) {
    if (name[0] !== '?' && name[0] !== '*' && !has(value, name)) throw new NoProof(`${at} has no ${name}`);
  }
}

/** The value of JSON. An account's id may have 19 digits, more than a number holds: it is read as text. */
const readJson = (text) => JSON.parse(text.replace(/"account_id":(-?[0-9]+)(?=[,}])/g, '"account_id":"#$1"'));

/** JSON as tombola writes it: no blanks, fields in the order given; an account's id as `readJson` reads it. */
const written = (value) => JSON.stringify(value).replace(/"account_id":"#([0-9]+)"/g, '"account_id":$1');

/** JSON with sorted names. Throws for text with half of a character, which has no one form. */
function sorted(value) {
  if (Array.isArray(value)) return `[${value.map(sorted).join(',')}]`;
  if (typeof value === 'object' && value !== null) {
    const names = Object.keys(value).sort();
    return `{${names.map((name) => `${sorted(name)}:${sorted(value[name])}`).join(',')}}`;
  }
  if (typeof value === 'string' && isBroken(value)) throw new Error('not text');
  return JSON.stringify(value);
}

// ---- small tools ---------------------------------------------------------------------------------------------------

const bytesOf = (text) => new TextEncoder().encode(text);
const textOf = (bytes) => new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
const hexOf = (bytes) => [...bytes].map((it) => it.toString(16).padStart(2, '0')).join('');
const unhex = (text) => Uint8Array.from(text.match(/../g) ?? [], (it) => parseInt(it, 16));
const sha256 = async (bytes) => new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
const isEqual = (one, other) => one.length === other.length && one.every((it, index) => it === other[index]);

function joined(...parts) {
  const all = new Uint8Array(parts.reduce((length, it) => length + it.length, 0));
  let at = 0;
  for (const it of parts) {
    all.set(it, at);
    at += it.length;
  }
  return all;
}

/** `number` in so many bytes, the highest first. */
function packed(number, length) {
  return Uint8Array.from({ length }, (_, index) => Number((BigInt(number) >> BigInt(8 * (length - 1 - index))) & 255n));
}

/** The bytes after their length in four bytes. */
const prefixed = (bytes) => joined(packed(bytes.length, 4), bytes);

/** The bytes of base64; null for text that is not the one way to write them. */
function standardBase64(text) {
  try {
    const raw = atob(text);
    return btoa(raw) === text ? Uint8Array.from(raw, (it) => it.charCodeAt(0)) : null;
  } catch {
    return null;
  }
}

/** The bytes of base64url without padding; null for other text. */
function unpacked(text) {
  if (!/^[A-Za-z0-9_-]*$/.test(text)) return null;
  const padding = '='.repeat((4 - (text.length % 4)) % 4);
  return standardBase64(text.replaceAll('-', '+').replaceAll('_', '/') + padding);
}

const cents = (amount) => BigInt(amount.replace('.', ''));

function amountOf(number) {
  const size = number < 0n ? -number : number;
  return `${number < 0n ? '-' : ''}${size / 100n}.${String(size % 100n).padStart(2, '0')}`;
}

const counted = (number, noun) => (number === 1 ? `${number} ${noun}` : `${number} ${noun}s`);
const listed = (texts) => (texts.length ? texts.join(', ') : 'nothing');

/** Whether the Ed25519 signature is right; throws NotYet where it cannot be checked here. */
async function isSigned(rawKey, signature, message) {
  let key;
  try {
    key = await crypto.subtle.importKey('raw', rawKey, 'Ed25519', false, ['verify']);
  } catch (error) {
    if (error.name !== 'NotSupportedError') return false;
    throw new NotYet(`${UNCHECKED}Use a newer browser, or verify.py with the Python package cryptography.`);
  }
  return crypto.subtle.verify('Ed25519', key, signature, message);
}

const node = (left, right) => sha256(joined(packed(1, 1), left, right));

/** Whether the Merkle tree (RFC 9162, 2.1.3.2) of `size` leaves with this root has `leaf` at `index`. */
async function isIncluded(leaf, index, size, proof, root) {
  if (index >= size) return false;
  let at = BigInt(index), last = BigInt(size) - 1n, found = leaf;
  for (const sibling of proof) {
    if (last === 0n) return false;
    if (at & 1n || at === last) {
      found = await node(sibling, found);
      while (!(at & 1n) && at) {
        at >>= 1n;
        last >>= 1n;
      }
    } else {
      found = await node(found, sibling);
    }
    at >>= 1n;
    last >>= 1n;
  }
  return last === 0n && isEqual(found, root);
}

// ---- odds ----------------------------------------------------------------------------------------------------------

/** The odds that a text says: of the built-in campaign, or a manifest in its canonical form. */
class Odds {
  constructor(text, hash) {
    this.hash = hash;
    this.tiers = new Map();
    this.guarantees = [];
    this.hasCounters = false;
    this.limits = {};
    this.isManifest = text.startsWith('{');
    if (this.isManifest) this.readManifest(text);
    else this.readLine(text);
    this.byCode = new Map(this.prizes.map((it) => [it.code, it]));
    this.weights = this.prizes.map((it) => BigInt(it.weight));
  }

  /** default,POINT,1.00,30x5.00,70x0.00 */
  readLine(text) {
    if (!matched(`${KEY},${KEY},${AMOUNT}(?:,[1-9][0-9]{0,9}x${AMOUNT})+`, text)) throw new Error('not odds');
    const [name, asset, cost, ...prizes] = text.split(',');
    Object.assign(this, { name, asset, cost: new Map([[1, cost]]) });
    this.prizes = prizes.map((it) => {
      const [weight, amount] = it.split('x');
      return { code: amount, weight: Number(weight), grants: [], limited: false };
    });
  }

  readManifest(text) {
    const form = JSON.parse(text);
    if (sorted(form) !== text) throw new Error('not canonical');
    checkForm(form, MANIFEST, 'odds');
    const cost = new Map(Object.entries(form.cost).map(([pulls, amount]) => [Number(pulls), amount]));
    Object.assign(this, { name: form.name, asset: form.asset, cost });
    this.prizes = form.prize.map((it) => {
      const grants = it.grants ?? [];
      const limited = has(it, 'stock') || has(it, 'per_account') || grants.some((grant) => has(grant, 'codes'));
      return { ...it, grants, limited };
    });
    for (const it of form.tier ?? []) {
      const weights = this.prizes.map((prize) => {
        if (!has(it.weights, prize.code)) throw new Error('a weight is missing');
        return BigInt(it.weights[prize.code]);
      });
      this.tiers.set(it.name, weights);
    }
    for (const it of form.guarantee ?? []) {
      if (has(it, 'soft_from') !== has(it, 'soft_step')) throw new Error('half a guarantee');
      this.guarantees.push({ ...it, prizes: new Set(it.prizes) });
    }
    const limits = form.limits ?? {};
    this.limits = { ...limits, ...form.eligibility };
    this.hasCounters = this.tiers.size > 0 || this.guarantees.length > 0 || Object.keys(limits).length > 0
      || this.prizes.some((it) => has(it, 'per_account'));
  }
}

// ---- drawing -------------------------------------------------------------------------------------------------------

const hmacKey = (key) => crypto.subtle.importKey('raw', key, { name: 'HMAC', hash: 'SHA-256' }, false, ['sign']);
const hmac = async (key, message) => new Uint8Array(await crypto.subtle.sign('HMAC', key, message));

/** 32 bytes by HKDF-SHA256 without salt (RFC 5869). */
async function hkdf(key, info) {
  const extracted = await hmac(await hmacKey(new Uint8Array(32)), key);
  return hmac(await hmacKey(extracted), joined(info, packed(1, 1)));
}

const total = (numbers) => numbers.reduce((sum, it) => sum + it, 0n);
const isStrictlyIn = (some, all) => some.size < all.size && [...some].every((it) => all.has(it));

/** The pulls of one request: HMAC-SHA256 over length-prefixed fields, 64 bits, and the weights. */
class Drawing {
  constructor(key, odds, account, requestKey, nonce) {
    Object.assign(this, { key, odds });
    const version = odds.isManifest ? 'tombola-draw-2' : 'tombola-draw-1';
    const texts = [account, requestKey, nonce].map(bytesOf);
    const parts = [bytesOf(version), bytesOf(odds.name), unhex(odds.hash), ...texts];
    this.prefix = joined(...parts.map(prefixed));
  }

  /** A number from 0 to below `tickets`. Numbers that would favour some outcomes are drawn again. */
  async ticket(pull, question, tickets) {
    must(tickets > 0n, 'By these odds nothing could be won.');
    const limit = (2n ** 64n / tickets) * tickets;
    const more = this.odds.isManifest ? [prefixed(bytesOf(String(pull))), prefixed(bytesOf(question))] : [];
    for (let counter = 0; ; counter += 1) {
      const digest = await hmac(this.key, joined(this.prefix, ...more, prefixed(packed(counter, 8))));
      const value = BigInt(`0x${hexOf(digest.slice(0, 8))}`);
      if (value < limit) return value % tickets;
    }
  }

  /** The index of the prize that the tickets say, whether it was there or not. */
  async draw(pull, ofTier, since) {
    const guarantees = this.odds.guarantees.map((it, index) => [it, since[index]]);
    const [due] = guarantees.find(([it, count]) => count + 1 >= it.hard_at) ?? [];
    let weights = due === undefined ? ofTier : this.within(ofTier, due);
    const base = total(weights);
    const added = guarantees
      .filter(([it]) => due === undefined || isStrictlyIn(it.prizes, due.prizes))
      .map(([it, count]) => [it, has(it, 'soft_from') && count + 2 > it.soft_from
        ? BigInt(count + 2 - it.soft_from) * BigInt(it.soft_step) : 0n]);
    let ticket = await this.ticket(pull, 'prize', base + total(added.map(([, tickets]) => tickets)));
    if (ticket >= base) {
      ticket -= base;
      for (const [guarantee, tickets] of added) {
        if (ticket < tickets) {
          weights = this.within(weights, guarantee);
          ticket = await this.ticket(pull, 'guarantee', total(weights));
          break;
        }
        ticket -= tickets;
      }
    }
    for (const [index, weight] of weights.entries()) {
      if (ticket < weight) return index;
      ticket -= weight;
    }
    throw new Wrong('By these odds nothing could be won.');
  }

  within(weights, guarantee) {
    return weights.map((weight, index) => (guarantee.prizes.has(this.odds.prizes[index].code) ? weight : 0n));
  }

  /** The codes of the prizes of all pulls, and what was drawn and not there, as notes write it. */
  async all(pulls, noted) {
    const { odds } = this;
    const weights = noted.tier ? odds.tiers.get(noted.tier) : odds.weights;
    const codes = [], met = [];
    let { since } = noted;
    for (let pull = 1; pull <= pulls; pull += 1) {
      let prize = odds.prizes[await this.draw(pull, weights, since)];
      while (prize.limited && noted.gone.includes(`${pull}.${prize.code}`)) {
        const word = `${pull}.${prize.code}`;
        must(!met.includes(word), 'The odds go in a circle.');
        met.push(word);
        must(odds.byCode.has(prize.instead), 'The odds do not say what is drawn instead.');
        prize = odds.byCode.get(prize.instead);
      }
      const { code } = prize;
      codes.push(code);
      since = odds.guarantees.map((it, index) => (it.prizes.has(code) ? 0 : since[index] + 1));
    }
    return [codes, met];
  }
}

// ---- a proof, read -------------------------------------------------------------------------------------------------

const COUNT = '(?:0|[1-9][0-9]{0,9})';
const DRAW_NOTES = `odds=(${HASH}) seed=(${EPOCH}|[0-9a-f]{16}) prizes=([^ ]+)(?: tier=([^ ]+))?(?: pulls=(${COUNT}))?`
  + `(?: since=(${COUNT}(?:,${COUNT})*))?(?: gone=([^ ]+))?`;
const PLAIN_NOTES = `odds=(${HASH}) seed=(${EPOCH}|[0-9a-f]{16})`;
const REFUND_NOTES = 'policy=(refuse|charge_only|write_off)(?: off=([^ ]+))?(?: reason=[\\s\\S]*)?';
const HEADER = '\\{"alg":"EdDSA","kid":"([0-9a-f]{16})","typ":"tombola-receipt\\+jws"\\}';
const ENTRIES = {
  reward: 'lottery_reward', item: 'lottery_item', coupon: 'lottery_coupon', notice: 'lottery_notice',
};
const REJECTED = {
  INSUFFICIENT_BALANCE: 'the balance was below the price',
  ACCOUNT_NOT_FOUND: 'the account does not exist',
  CAMPAIGN_CLOSED: 'the campaign was not open',
  LIMIT_REACHED: 'a limit of the campaign was reached',
  NOT_ELIGIBLE: 'the account may not take part',
};
const RECEIPT_NAMES = { accepted: 'the receipt for the request', settled: 'the receipt for the result' };

/** A proof and what else is known. `trust` has what was published or kept: anchor, keys, booksKey, receipts. */
class Proof {
  static async read(it, trust) {
    const p = new Proof();
    Object.assign(p, { it, trust, rows: it.rows, refund: it.refund, epoch: it.epoch });
    Object.assign(p, { status: it.status, result: it.result });
    const told = trust.keys ?? it.keys;
    p.keys = told === null ? new Map() : await keysOf(told);
    let asked;
    try {
      asked = readJson(it.request);
    } catch {
      throw new NoProof('the request is not one for a draw');
    }
    const { request_key: key, lottery_session_id: session, account_id: account, campaign } = asked ?? {};
    const { pulls = null, client_nonce: nonce = '' } = asked ?? {};
    const isRight = [key, session, campaign].every((text) => isText(text, KEY)) && isText(account, `#${ID}`)
      && (pulls === null || (Number.isInteger(pulls) && pulls >= 1 && pulls <= 100))
      && isText(nonce, '(?:[A-Za-z0-9_-]{16,64})?');
    if (!isRight) throw new NoProof('the request is not one for a draw');
    return Object.assign(p, { key, session, rawAccount: account, account: account.slice(1), campaign, pulls, nonce });
  }

  // -- what the request, the odds, the notes and the receipts say

  canonicalRequest() {
    if (this.pulls === null && !this.nonce) {
      return written({
        v: 1, request_key: this.key, lottery_session_id: this.session, account_id: this.rawAccount,
        campaign: this.campaign,
      });
    }
    const fields = {
      v: 2, kind: 'draw', account_id: this.rawAccount, request_key: this.key, lottery_session_id: this.session,
      campaign: this.campaign,
    };
    if (this.pulls !== null) fields.pulls = this.pulls;
    if (this.nonce) fields.client_nonce = this.nonce;
    return written(fields);
  }

  /** The odds; throws Wrong for a text that is none, or is not the one that was named. */
  async odds() {
    const told = this.it.odds;
    if (told === null) throw new NotYet('The proof names no odds.');
    const hash = hexOf(await sha256(bytesOf(told.text)));
    must(hash === told.hash, 'The odds are not the ones whose hash is named.');
    try {
      return new Odds(told.text, told.hash);
    } catch {
      throw new Wrong('The text of the odds cannot be read.');
    }
  }

  /** The row of the charge, the first one. */
  charge() {
    if (!['completed', 'rejected'].includes(this.status)) {
      throw new NotYet('The draw has not been settled: there is no result yet.');
    }
    must(this.rows.length, 'A settled draw has a charge in the ledger, and this one has no row.');
    return this.rows[0];
  }

  /** What the charge's notes record; throws Wrong for notes that no draw by these odds has written. */
  noted(odds) {
    const found = matched(odds.isManifest ? DRAW_NOTES : PLAIN_NOTES, this.charge().notes ?? '');
    must(found !== null, 'The notes of the charge cannot be read.');
    if (!odds.isManifest) return { seed: found[2], prizes: [], tier: '', pulls: null, since: [], gone: [] };
    const noted = {
      seed: found[2], prizes: found[3].split(','), tier: found[4] ?? '',
      pulls: found[5] === undefined ? null : Number(found[5]),
      since: found[6] ? found[6].split(',').map(Number) : [],
      gone: found[7] ? found[7].split(',') : [],
    };
    must(
      (noted.pulls !== null) === odds.hasCounters && noted.since.length === odds.guarantees.length
      && (!noted.tier || odds.tiers.has(noted.tier))
      && noted.since.every((it) => it <= Math.min(noted.pulls ?? 0, 1_000_000)),
      'The notes record counters that no account can have under these odds.',
    );
    return noted;
  }

  /** The fields of a receipt; throws Wrong if it is not about this request. Its signature: `signed`. */
  receipt(jws, kind) {
    const name = RECEIPT_NAMES[kind];
    let said, text;
    try {
      text = textOf(unpacked(jws.split('.')[1]));
      said = readJson(text);
    } catch {
      throw new Wrong(`Not readable: ${name}.`);
    }
    const names = ['odds_hash', 'seed_epoch', 'commitment', 'accepted_at'];
    const more = kind === 'settled' ? ['result_sha256', 'settled_at'] : [];
    const isWhole = typeof said === 'object' && said !== null && [...names, ...more].every((it) => has(said, it));
    must(isWhole, `Not readable: ${name}.`);
    const fields = {
      receipt: kind, v: 1, request_key: this.key, lottery_session_id: this.session, account_id: this.rawAccount,
      kind: 'draw', campaign: this.campaign, pulls: this.pulls, odds_hash: said.odds_hash,
      seed_epoch: said.seed_epoch, commitment: said.commitment, client_nonce: this.nonce || null,
      accepted_at: said.accepted_at,
    };
    for (const it of more) fields[it] = said[it];
    must(text === written(fields), `Not about this request: ${name}.`);
    const forms = { odds_hash: HASH, seed_epoch: EPOCH, commitment: HASH, accepted_at: MOMENT };
    must(
      names.every((it) => said[it] === null || isText(said[it], forms[it]))
      && (said.seed_epoch === null) === (said.commitment === null)
      && (kind === 'settled' || said.accepted_at !== null)
      && (kind !== 'settled' || (isText(said.result_sha256, HASH) && isText(said.settled_at, MOMENT))),
      `Not readable: ${name}.`,
    );
    return said;
  }

  /** Throw Wrong unless one of the published keys has signed this receipt; `at` is the moment that it says. */
  async signed(jws, at, name) {
    const [head, , signature] = jws.split('.').map(unpacked);
    const found = matched(HEADER, String.fromCharCode(...(head ?? [])));
    must(found !== null, `Not readable: ${name}.`);
    const key = this.keys.get(found[1]);
    must(key !== undefined, `Signed by a key that is not among the published ones: ${name}.`);
    const [raw, end] = key;
    must(end === null || at < end, `Dated after the end of the key that signed it: ${name}.`);
    const message = bytesOf(jws.slice(0, jws.lastIndexOf('.')));
    must(await isSigned(raw, signature ?? new Uint8Array(), message), `The signature is not right: ${name}.`);
  }

  /** The fields of the proof's own receipt of this kind, null without one. */
  said(kind) {
    const jws = this.it.receipts[kind];
    return jws === null ? null : this.receipt(jws, kind);
  }
}

// ---- the claims: each returns words, or throws Wrong or NotYet -----------------------------------------------------

async function requestIsYours(p) {
  must(p.it.request === p.canonicalRequest(), 'The bytes of the request are not in their one form.');
  const fingerprint = hexOf(await sha256(bytesOf(p.it.request)));
  must(fingerprint === p.it.fingerprint, 'The request has another fingerprint.');
  return `Account ${p.account} asked for ${counted(p.pulls ?? 1, 'pull')} of ${p.campaign}, under the key ${p.key}.`;
}

async function receiptIsRight(p) {
  const said = p.said('accepted');
  if (said === null) {
    throw new NotYet('There is no receipt in this proof. Receipts are signed where the operator has set a key.');
  }
  await p.signed(p.it.receipts.accepted, said.accepted_at, RECEIPT_NAMES.accepted);
  return `The operator signed that this request was accepted, at ${said.accepted_at}.`;
}

async function keptReceiptsFit(p) {
  for (const jws of p.trust.receipts) {
    must(matched(JWS, jws), 'This is no receipt.');
    const payload = String.fromCharCode(...(unpacked(jws.split('.')[1]) ?? []));
    const kind = payload.startsWith('{"receipt":"settled"') ? 'settled' : 'accepted';
    const kept = p.receipt(jws, kind), now = p.said('accepted');
    await p.signed(jws, kind === 'settled' ? kept.settled_at : kept.accepted_at, 'your own receipt');
    if (kind === 'settled') {
      must(p.result !== null, 'Your receipt names a result, and this proof has none.');
      const digest = hexOf(await sha256(bytesOf(p.result)));
      must(kept.result_sha256 === digest, 'Your receipt names another result than this proof.');
    }
    const isRight = p.it.odds === null || [null, p.it.odds.hash].includes(kept.odds_hash);
    must(isRight, 'Your receipt names other odds than this proof.');
    const { epoch } = p;
    if (kept.seed_epoch === null) {
      throw new NotYet('Your receipt names no secret: the draw was bound to one when it settled.');
    }
    if (epoch !== null && (kept.seed_epoch !== epoch.name || kept.commitment !== epoch.commitment)) {
      if (now !== null && (kept.accepted_at ?? '') < now.accepted_at && kept.seed_epoch !== epoch.name) {
        throw new NotYet(
          'After your receipt the request was accepted once more, under another secret. Ask the operator '
          + 'why: this happens to a request that was given up and then replayed.',
        );
      }
      throw new Wrong('Your receipt names another secret than this proof.');
    }
  }
  return 'What you kept says the same as this proof.';
}

async function secretWasFixed(p) {
  const { epoch } = p;
  let said = p.said('accepted');
  if (epoch === null) throw new NotYet('The proof names no secret yet.');
  if (p.status === 'completed') {
    const noted = p.noted(await p.odds());
    must(noted.seed === seedName(epoch), 'The ledger names another secret than this proof.');
  }
  if (said !== null && said.seed_epoch === null) said = null;
  if (said !== null) {
    must(
      said.seed_epoch === epoch.name && said.commitment === epoch.commitment,
      'The receipt names another secret than this proof.',
    );
    must(
      epoch.revealed_at === null || said.accepted_at < epoch.revealed_at,
      'The request was accepted when its secret was public already.',
    );
  }
  if (epoch.secret === null) throw new NotYet(publishedLater(epoch));
  must(
    (await commitmentOf(epoch)) === epoch.commitment,
    'The published secret is not the one that was promised before the draw.',
  );
  if (said === null) {
    throw new NotYet('The secret fits, but without a receipt that names it nothing shows that it was promised before.');
  }
  return `The receipt promised the secret of epoch ${epoch.name} by its fingerprint, and the published one has it.`;
}

function publishedLater(epoch) {
  const ends = epoch.closes_at === null ? '' : `, after ${epoch.closes_at}`;
  return `The secret of epoch ${epoch.name} is not published yet. Ask for the proof again when it is over${ends}.`;
}

/** How notes name the secret of an epoch: draws of before the epochs have the beginning of its SHA-256. */
const seedName = (epoch) => (epoch.name !== '0.0' ? epoch.name : epoch.anchor.slice(0, 16));

async function commitmentOf(epoch) {
  const label = bytesOf(epoch.name === '0.0' ? '' : 'tombola-commitment-1');
  return hexOf(await sha256(joined(label, unhex(epoch.secret))));
}

async function secretIsOfTheChain(p) {
  const { epoch } = p;
  if (epoch === null) throw new NotYet('The proof names no secret yet.');
  const trusted = p.trust.anchor ?? null;
  must(trusted === null || trusted === epoch.anchor, 'The proof names another anchor than the one you gave.');
  if (epoch.secret === null) throw new NotYet(publishedLater(epoch));
  // The chain of draws of before the epochs is one seed and its hash.
  const steps = epoch.name === '0.0' ? 1 : Number(epoch.name.split('.')[1]);
  must(steps >= 1 && steps <= 3650, 'A chain has the epochs 1 to 3650.');
  let found = unhex(epoch.secret);
  for (let step = 0; step < steps; step += 1) found = await sha256(found);
  must(hexOf(found) === epoch.anchor, 'The secret does not belong to the chain with this anchor.');
  const given = trusted !== null ? 'the anchor that you gave' : `the anchor ${epoch.anchor}`;
  return `Hashed ${counted(steps, 'time')}, the secret is ${given}: it was fixed when the chain began.`;
}

async function oddsAreNamed(p) {
  const odds = await p.odds();
  must(odds.name === p.campaign, `These are the odds of another campaign, ${odds.name}.`);
  for (const kind of ['accepted', 'settled']) {
    const said = p.said(kind);
    const isRight = said === null || [null, odds.hash].includes(said.odds_hash);
    must(isRight, `Other odds are named by ${RECEIPT_NAMES[kind]}.`);
  }
  for (const row of p.rows) {
    must((row.notes ?? '').startsWith(`odds=${odds.hash} `), 'The ledger names other odds than this proof.');
  }
  const said = p.said('accepted');
  const where = said !== null && said.odds_hash ? 'the receipt' : p.rows.length ? 'the ledger' : 'the record';
  return `The odds of ${odds.name} have the hash that ${where} names, ${odds.hash.slice(0, 16)}…`;
}

/** The odds, what the notes record, and what the secret says: codes of prizes, and what was drawn and gone. */
async function recomputed(p) {
  const odds = await p.odds();
  const noted = p.noted(odds);
  const pulls = p.pulls ?? 1;
  must(odds.cost.has(pulls), `These odds do not sell ${counted(pulls, 'pull')} at once.`);
  const { epoch } = p;
  if (epoch === null) throw new NotYet('The proof names no secret yet.');
  must(noted.seed === seedName(epoch), 'The ledger names another secret than this proof.');
  if (epoch.secret === null) throw new NotYet(publishedLater(epoch));
  const secret = unhex(epoch.secret);
  const key = epoch.name === '0.0' ? secret : await hkdf(secret, bytesOf(`draw${p.campaign}`));
  const drawing = new Drawing(await hmacKey(key), odds, p.account, p.key, p.nonce);
  const [codes, met] = await drawing.all(pulls, noted);
  return { odds, noted, codes, met };
}

async function prizesAreDrawn(p) {
  const { odds, noted, codes, met } = await recomputed(p);
  if (odds.isManifest) {
    must(
      isEqual(noted.prizes, codes),
      `The secret says ${listed(codes)}; the ledger says ${listed(noted.prizes)}.`,
    );
    must(isEqual(noted.gone, met), 'The ledger says of other prizes that they were not there than the draw met.');
  } else {
    const paid = p.rows.filter((row) => row.business_type === 'lottery_reward').map((row) => row.delta_amount);
    const wanted = codes.filter((it) => cents(it));
    must(isEqual(paid, wanted), `The secret says ${listed(wanted)}; the ledger says ${listed(paid)}.`);
  }
  return `Drawn again with the secret, the odds and your request: ${listed(codes)}.`;
}

async function nonceWentIn(p) {
  for (const kind of ['accepted', 'settled']) p.said(kind); // throws for a receipt with another nonce
  await prizesAreDrawn(p);
  return `The random word ${p.nonce} went in. Where your browser made it, no request key was chosen for its outcome.`;
}

/** The rows that the draw must have written: key, type, asset, amount, notes, whether on the account that pays. */
async function expectedRows(p) {
  const odds = await p.odds();
  const noted = p.noted(odds);
  const pulls = p.pulls ?? 1;
  must(odds.cost.has(pulls), `These odds do not sell ${counted(pulls, 'pull')} at once.`);
  const charge = `-${odds.cost.get(pulls)}`;
  if (!odds.isManifest) {
    const notes = `odds=${odds.hash} seed=${noted.seed}`;
    const rows = [[`${p.key}:consume`, 'lottery_consume', odds.asset, charge, notes, true]];
    for (const { delta_amount: amount } of p.rows.slice(1, 2)) {
      must(cents(amount) > 0n && odds.byCode.has(amount), `These odds have no prize of ${amount}.`);
      rows.push([`${p.key}:reward`, 'lottery_reward', odds.asset, amount, notes, true]);
    }
    return rows;
  }
  must(noted.prizes.length === pulls, 'The notes do not name one prize for each pull.');
  const rows = [[`${p.key}:consume`, 'lottery_consume', odds.asset, charge, p.charge().notes, true]];
  for (const [index, code] of noted.prizes.entries()) {
    must(odds.byCode.has(code), `These odds have no prize ${code}.`);
    const seen = {};
    for (const grant of odds.byCode.get(code).grants) rows.push(granted(p, odds, index + 1, code, grant, seen));
  }
  return rows;
}

function granted(p, odds, pull, code, grant, seen) {
  const { asset = '', notify = '' } = grant;
  const [prefix] = asset.split('.');
  let kind = notify ? 'notice' : { ITEM: 'item', COUPON: 'coupon' }[prefix] ?? 'reward';
  kind = asset.includes('.') || notify ? kind : 'reward';
  seen[kind] = (seen[kind] ?? 0) + 1;
  const number = seen[kind];
  const isSingle = (p.pulls ?? 1) === 1;
  const entry = number > 1 ? `${kind}_${pull}_${number}` : isSingle ? kind : `${kind}_${pull}`;
  const key = `${p.key}:${entry}`;
  let notes = `odds=${odds.hash} prize=${code} pull=${pull}`;
  if (grant.codes) {
    const told = p.rows.find((it) => it.idempotency_key === key)?.notes ?? '';
    const found = told.startsWith(notes) ? matched(' code=([!-~]{1,100})', told.slice(notes.length)) : null;
    must(found !== null, `The prize ${code} hands out a code, and the ledger has none.`);
    notes = `${notes} code=${found[1]}`;
  }
  if (notify) return [key, ENTRIES[kind], odds.asset, '0.00', `${notes} notify=${notify}`, true];
  if (grant.amount === undefined) throw new Error('a grant without an amount');
  return [key, ENTRIES[kind], asset, grant.amount, notes, asset === odds.asset];
}

/** Throw Wrong unless the rows are the expected ones, each in order, and the balances continue. */
function checkRows(p, found, expected, session) {
  const accountOf = new Map(), balanceOf = new Map();
  let last = 0n;
  for (const [index, row] of found.slice(0, expected.length).entries()) {
    const [key, , asset, amount, , isPayer] = expected[index];
    const names = ['idempotency_key', 'business_type', 'asset_code', 'delta_amount', 'notes'];
    const isRight = names.every((name, at) => row[name] === expected[index][at]);
    must(isRight, `The ledger row ${row.idempotency_key} is not as it must be.`);
    const isOfSession = row.lottery_session_id === session && row.business_id === session;
    must(isOfSession, `The ledger row ${key} is of another session.`);
    const account = row.account_id;
    if (!isPayer && !accountOf.has(asset)) accountOf.set(asset, account);
    const isOwn = isPayer ? account === p.account : account === accountOf.get(asset) && account !== p.account;
    must(isOwn, `The ledger row ${key} is on another account.`);
    const before = cents(row.balance_before), after = cents(row.balance_after);
    must(after === before + cents(amount), `The balance after the ledger row ${key} does not add up.`);
    const isNext = !balanceOf.has(account) || balanceOf.get(account) === before;
    must(isNext, `The balance before the ledger row ${key} does not continue.`);
    must(BigInt(row.transaction_id) > last, 'The ledger rows are not in their order.');
    balanceOf.set(account, after);
    last = BigInt(row.transaction_id);
  }
  for (const row of found.slice(expected.length)) {
    throw new Wrong(`The ledger has a row ${row.idempotency_key} that the draw does not say.`);
  }
  for (const [key] of expected.slice(found.length)) throw new Wrong(`The ledger lacks the row ${key}.`);
}

async function rowsAreRight(p) {
  if (p.status === 'accepted' || p.status === 'dead') {
    must(!p.rows.length, 'The draw has not been settled, and yet there are ledger rows.');
    if (p.status === 'accepted') throw new NotYet('The draw has not been settled: nothing was charged so far.');
    return 'The request was given up. Nothing was charged.';
  }
  const expected = await expectedRows(p);
  checkRows(p, p.rows, expected, p.session);
  const [charge, ...won] = expected;
  const got = won.filter((it) => cents(it[3])).map(([, , asset, amount]) => `${amount} ${asset}`);
  return `Charged ${charge[3].slice(1)} ${charge[2]}; handed out: ${listed(got)}.`;
}

async function resultIsRight(p) {
  if (p.status === 'accepted' || p.status === 'dead') {
    must(p.result === null, 'The draw has not been settled, and yet there is a result.');
    throw new NotYet('The draw has no result.');
  }
  must(p.result !== null, 'A settled draw has a result, and this proof has none.');
  must(p.result === (await expectedResult(p)), 'The result is not what the ledger says.');
  return 'Each byte of the result follows from the request and the ledger rows.';
}

async function expectedResult(p) {
  const own = p.rows.filter((row) => row.account_id === p.account);
  const paid = total(own.filter((row) => row.business_type === 'lottery_reward').map((row) => cents(row.delta_amount)));
  const [reason, balance] = p.status === 'rejected' ? rejectionOf(p) : [null, own.at(-1)?.balance_after ?? null];
  const fields = {
    v: p.pulls === null ? 1 : 2, request_key: p.key, lottery_session_id: p.session, account_id: p.rawAccount,
    campaign: p.campaign, status: p.status, reason, prize_amount: amountOf(paid), balance_after: balance,
    transactions: p.rows.map((it) => ({
      idempotency_key: it.idempotency_key, business_type: it.business_type, asset_code: it.asset_code,
      delta_amount: it.delta_amount, balance_before: it.balance_before, balance_after: it.balance_after,
    })),
  };
  if (p.pulls === null) return written(fields);
  Object.assign(fields, { kind: 'draw', odds_hash: null, prizes: [] });
  if (p.status === 'completed') {
    const odds = await p.odds();
    must(odds.isManifest, 'The built-in campaign sells single draws.');
    fields.odds_hash = odds.hash;
    fields.prizes = p.noted(odds).prizes.map((code, index) => ({ pull: index + 1, code, grants: [] }));
    const form = `odds=${HASH} prize=[^ ]+ pull=([1-9][0-9]{0,2})(?: code=([!-~]+))?(?: notify=([^ ]+))?`;
    for (const row of p.rows.slice(1)) {
      const found = matched(form, row.notes ?? '');
      must(found !== null && Number(found[1]) <= fields.prizes.length, 'The notes of a prize cannot be read.');
      fields.prizes[Number(found[1]) - 1].grants.push({
        asset_code: found[3] ? '' : row.asset_code, amount: row.delta_amount, notify: found[3] ?? '',
        code: found[2] ?? '', idempotency_key: row.idempotency_key,
      });
    }
  }
  return written(fields);
}

/** The reason and the balance that a rejected result says. */
function rejectionOf(p) {
  let said;
  try {
    said = readJson(p.result ?? '');
  } catch {
    throw new Wrong('The result cannot be read.');
  }
  const isReadable = typeof said === 'object' && said !== null && has(said, 'reason') && has(said, 'balance_after');
  must(isReadable, 'The result cannot be read.');
  const { reason, balance_after: balance } = said;
  const isBalance = balance === null || isText(balance, AMOUNT);
  must(typeof reason === 'string' && has(REJECTED, reason) && isBalance, 'The result names no reason that exists.');
  return [reason, balance];
}

async function rejectionIsRight(p) {
  must(!p.rows.length, 'A rejected draw has no ledger row, and this one has.');
  must(!p.refund.length, 'A rejected draw has no refund, and this one has.');
  const [reason, balance] = rejectionOf(p);
  must(
    (reason === 'ACCOUNT_NOT_FOUND') === (balance === null),
    'The balance in the result does not fit its reason.',
  );
  if (p.it.odds !== null) {
    const odds = await p.odds(), pulls = p.pulls ?? 1;
    must(odds.cost.has(pulls), `These odds do not sell ${counted(pulls, 'pull')} at once.`);
    if (reason === 'INSUFFICIENT_BALANCE') {
      must(cents(balance) < cents(odds.cost.get(pulls)), `The balance ${balance} is enough for the price.`);
    }
    if (reason === 'LIMIT_REACHED') {
      must(has(odds.limits, 'per_day') || has(odds.limits, 'per_account'), 'These odds have no limit.');
    }
    if (reason === 'NOT_ELIGIBLE') {
      must(has(odds.limits, 'deny') || has(odds.limits, 'allow'), 'By these odds everybody may take part.');
    }
  }
  return `Nothing was drawn and nothing was charged: ${REJECTED[reason]}.`;
}

async function resultReceiptIsRight(p) {
  const said = p.said('settled');
  if (said === null) throw new NotYet('There is no receipt for a result in this proof.');
  must(p.result !== null, 'The receipt names a result, and this proof has none.');
  const digest = hexOf(await sha256(bytesOf(p.result)));
  must(said.result_sha256 === digest, 'The receipt names another result than the one in this proof.');
  const accepted = p.said('accepted');
  const names = ['odds_hash', 'seed_epoch', 'commitment', 'accepted_at'];
  must(
    accepted === null || names.every((it) => said[it] === accepted[it]),
    'The receipt for the result and the one for the request do not say the same.',
  );
  const isAfter = said.accepted_at === null || said.accepted_at <= said.settled_at;
  must(isAfter, 'By its receipt the draw settled before it was accepted.');
  await p.signed(p.it.receipts.settled, said.settled_at, RECEIPT_NAMES.settled);
  return `The operator signed exactly this result, at ${said.settled_at}.`;
}

const NUMBERS = [
  'transaction_id', 'account_id', 'delta_amount', 'balance_before', 'balance_after', 'created_at', 'updated_at',
];
const TEXTS = ['business_id', 'lottery_session_id', 'idempotency_key', 'business_type', 'asset_code', 'notes'];

function leafOf(row) {
  const parts = NUMBERS.map((name) => bytesOf(`|${row[name]}`));
  for (const name of TEXTS) {
    const value = row[name] === null ? null : bytesOf(row[name]);
    if (value === null) parts.push(bytesOf('|-|'));
    else parts.push(bytesOf(`|${value.length}|`), value);
  }
  return sha256(joined(packed(0, 1), ...parts));
}

async function rowsAreSealed(p) {
  const rows = [...p.rows, ...p.refund];
  if (!rows.length) throw new NotYet('The draw has not been settled: there is nothing to seal.');
  const { books } = p.it;
  if (books === null) throw new NotYet('The ledger rows are not sealed yet. Ask for the proof again in some minutes.');
  const blocks = new Map();
  for (const it of books.blocks) {
    const lines = it.text.split('\n');
    const isRight = lines.length === 9 && lines[0] === 'tombola block 1' && lines[8] === ''
      && lines.slice(1, 5).every((line) => matched(ID, line)) && matched(HASH, lines[5]) && matched(HASH, lines[7]);
    must(isRight, 'A sealed block cannot be read.');
    const [first, last, count] = lines.slice(2, 5).map(BigInt);
    const hash = await sha256(joined(packed(0, 1), bytesOf(it.text)));
    blocks.set(lines[1], { first, last, count, root: unhex(lines[5]), hash, proof: it.proof.map(unhex) });
  }
  const leaves = new Map(books.leaves.map((it) => [it.transaction_id, it]));
  for (const row of rows) {
    const it = leaves.get(row.transaction_id);
    if (it === undefined) throw new NotYet(`The ledger row ${row.idempotency_key} is not sealed yet.`);
    must(blocks.has(it.block), 'The proof lacks the block that a ledger row is said to be in.');
    const { first, last, count, root } = blocks.get(it.block);
    const id = BigInt(row.transaction_id), leaf = await leafOf(row);
    must(
      first <= id && id <= last && (await isIncluded(leaf, BigInt(it.index), count, it.proof.map(unhex), root)),
      `The ledger row ${row.idempotency_key} is not the one that was sealed.`,
    );
  }
  return blocksAreSigned(p, books, new Set(rows.map((row) => leaves.get(row.transaction_id).block)), blocks);
}

const NOTE = '([^\\n]+)\\n(0|[1-9][0-9]{0,15})\\n([A-Za-z0-9+/]{43}=)\\n\\n([\\s\\S]+)';

async function blocksAreSigned(p, books, used, blocks) {
  const note = books.checkpoint;
  if (note === null) throw new NotYet('The ledger rows are sealed, and no signed checkpoint covers them yet.');
  const found = matched(NOTE, note);
  must(found !== null, 'The checkpoint cannot be read.');
  const [, origin, sizeText, rootText, signatures] = found;
  const size = BigInt(sizeText), root = standardBase64(rootText);
  must(root !== null, 'The checkpoint cannot be read.');
  const numbers = [...used].map(BigInt).sort((one, other) => (one < other ? -1 : 1));
  if (numbers.at(-1) > size) {
    throw new NotYet('The ledger rows are sealed, and no signed checkpoint covers them yet.');
  }
  for (const number of numbers) {
    const { hash, proof } = blocks.get(String(number));
    const isThere = await isIncluded(hash, number - 1n, size, proof, root);
    must(isThere, `The sealed block ${number} is not under the signed checkpoint.`);
  }
  const text = p.trust.booksKey ?? books.key;
  if (text === null) {
    throw new NotYet("The checkpoint was not checked: give the operator's public key of the books.");
  }
  const [name, keyId, ...rest] = text.trim().split('+');
  const key = standardBase64(rest.join('+')) ?? new Uint8Array();
  must(key.length === 33 && key[0] === 1, 'This is no public key of the books.');
  const digest = hexOf(await sha256(joined(bytesOf(`${name}\n`), key)));
  must(digest.slice(0, 8) === keyId, 'This is no public key of the books.');
  must(origin === name, 'The checkpoint is of another origin than the key.');
  for (const line of signatures.split('\n')) {
    const words = line.split(' ');
    const signature = (words.length === 3 ? standardBase64(words[2]) : null) ?? new Uint8Array();
    if (words[0] === '—' && words[1] === name && hexOf(signature.slice(0, 4)) === keyId) {
      const message = bytesOf(`${origin}\n${sizeText}\n${rootText}\n`);
      const isRight = await isSigned(key.slice(1), signature.slice(4), message);
      must(isRight, 'The signature of the checkpoint is not right.');
      const where = numbers.join(', ');
      return `The rows are in block ${where} of the sealed books, under a signed checkpoint of ${size} blocks.`;
    }
  }
  throw new Wrong('The checkpoint is not signed by the key of the books.');
}

async function refundIsRight(p) {
  must(p.status === 'completed', 'A draw that was not settled has a refund.');
  const odds = await p.odds(), [first] = p.refund;
  const found = matched(REFUND_NOTES, first.notes ?? '');
  must(found !== null, 'The notes of the refund cannot be read.');
  const policy = found[1], off = new Map();
  for (const word of found[2] ? found[2].split(',') : []) {
    const [entry, ...rest] = word.split(':');
    const amount = rest.join(':');
    must(matched(AMOUNT, amount) && cents(amount) > 0n, 'The notes of the refund cannot be read.');
    off.set(entry, cents(amount));
  }
  must(policy === 'write_off' || !off.size, 'Only a refund that writes off may leave out a prize.');
  must(p.rows.length, 'A settled draw has a charge in the ledger, and this one has no row.');
  const back = amountOf(-cents(p.rows[0].delta_amount));
  const expected = [[`${p.key}:refund`, 'refund', odds.asset, back, first.notes, true]];
  const collected = [];
  for (const row of policy !== 'charge_only' ? p.rows.slice(1) : []) {
    const entry = row.idempotency_key.slice(row.idempotency_key.indexOf(':') + 1), amount = cents(row.delta_amount);
    const missing = off.get(entry) ?? 0n;
    off.delete(entry);
    must(missing <= amount, 'The refund writes off more than was handed out.');
    if (amount > missing) {
      const taken = amountOf(missing - amount), type = row.business_type.replaceAll('lottery_', 'refund_');
      const isPayer = row.account_id === p.account;
      expected.push([`${p.key}:refund_${entry}`, type, row.asset_code, taken, first.notes, isPayer]);
      collected.push(`${taken.slice(1)} ${row.asset_code}`);
    }
  }
  must(!off.size, 'The refund writes off what was not handed out.');
  checkRows(p, p.refund, expected, first.lottery_session_id);
  const ofAsset = new Map(p.rows.map((row) => [row.asset_code, row.account_id]));
  for (const row of p.refund.slice(1)) {
    must(row.account_id === ofAsset.get(row.asset_code), 'The refund collects from another account.');
  }
  must(first.lottery_session_id !== p.session, 'The refund has the session of the draw.');
  return `Returned ${back} ${odds.asset}; collected: ${listed(collected)}.`;
}

// ---- all of it -----------------------------------------------------------------------------------------------------

const CLAIMS = [
  ['request', 'What you asked for', requestIsYours],
  ['accepted', 'The receipt for your request', receiptIsRight],
  ['kept', 'The receipts that you kept', keptReceiptsFit],
  ['commitment', 'The secret was promised before your draw', secretWasFixed],
  ['anchor', 'The secret belongs to the published chain', secretIsOfTheChain],
  ['nonce', 'Your own random word went into the draw', nonceWentIn],
  ['odds', 'The odds are the ones that were named', oddsAreNamed],
  ['draw', 'The prizes are what the secret says', prizesAreDrawn],
  ['rejection', 'Why nothing was drawn', rejectionIsRight],
  ['rows', 'The charge and the prizes in the ledger', rowsAreRight],
  ['result', 'The result says what the ledger says', resultIsRight],
  ['settled', 'The receipt for your result', resultReceiptIsRight],
  ['refund', 'The refund', refundIsRight],
  ['sealed', 'The ledger rows are sealed', rowsAreSealed],
];

/** Which claims this proof makes, by name. */
function claimsOf(p) {
  const names = ['request', 'accepted', 'odds', 'result', 'settled'];
  if (p.status === 'rejected') {
    names.push('rejection');
  } else {
    names.push('commitment', 'anchor', 'draw', 'rows', 'sealed');
    if (p.nonce) names.push('nonce');
    if (p.refund.length) names.push('refund');
  }
  if (p.trust.receipts?.length) names.push('kept');
  return new Set(names);
}

/** What a proof cannot show by itself, in words. */
async function limitsOf(p) {
  const limits = [];
  if (p.status !== 'rejected' && !p.nonce) {
    limits.push(
      'Your request had no random word of yours: you did not choose any randomness. Somebody who knew the secret '
      + 'could have chosen the request key by its outcome.',
    );
  }
  if (p.status === 'rejected') {
    limits.push("The reason is the operator's record: a proof cannot show your balance, or what others did.");
  }
  if (p.status === 'completed') {
    let odds = null, noted = null;
    try {
      odds = await p.odds();
      noted = p.noted(odds);
    } catch {
      odds = null;
    }
    if (odds?.hasCounters) {
      limits.push(
        "How much you had spent and how often you had drawn before (tier, counters) is the operator's record. "
        + 'Your earlier draws show it: compare.',
      );
    }
    if (odds !== null && noted.gone.length) {
      const gone = listed(noted.gone.map((word) => word.split('.').slice(1).join('.')));
      limits.push(`That these prizes were not there any more is the operator's record: ${gone}.`);
    }
    if (p.rows.some((row) => row.account_id !== p.account)) {
      limits.push("That the other accounts in the rows are yours is the operator's record.");
    }
  }
  if ((p.trust.keys ?? null) === null || (p.trust.anchor ?? null) === null) {
    limits.push(
      "Keys and anchor in a proof are its operator's word. Compare them with what was published before your draw.",
    );
  }
  return limits;
}

/** The report on a proof: its verdict, its claims with their verdicts and words, its limits. Throws NoProof. */
export async function verify(text, trust = {}) {
  let fields;
  try {
    fields = JSON.parse(text);
  } catch {
    throw new NoProof('this is not JSON');
  }
  checkForm(fields, FORM, 'the proof');
  if (fields.v !== 1) throw new NoProof('this program reads proofs of version 1');
  const p = await Proof.read(fields, trust);
  const names = claimsOf(p), claims = [];
  for (const [claim, title, proves] of CLAIMS) {
    if (names.has(claim)) {
      let verdict = PROVEN, words;
      try {
        words = await proves(p);
      } catch (error) {
        verdict = error instanceof NotYet ? NOT_YET : FALSE;
        const isTold = error instanceof NotYet || error instanceof Wrong;
        words = isTold ? error.message : 'This part of the proof cannot be read.';
      }
      claims.push({ claim, title, verdict, words });
    }
  }
  const verdict = [FALSE, NOT_YET].find((it) => claims.some((claim) => claim.verdict === it)) ?? PROVEN;
  return { session: p.session, verdict, claims, limits: await limitsOf(p) };
}

/** The keys of a JWK Set (RFC 8037) and their ends, by their ids. Throws NoProof for other text. */
async function keysOf(text) {
  const keys = new Map();
  try {
    for (const { kid, kty, crv, x, exp: end = null } of JSON.parse(text).keys) {
      const raw = unpacked(x);
      const isRight = kty === 'OKP' && crv === 'Ed25519' && raw !== null && raw.length === 32;
      if (!isRight || hexOf(await sha256(raw)).slice(0, 16) !== kid) throw new Error('not the key that its id says');
      if (end !== null && (!Number.isInteger(end) || end < 0 || end >= 2 ** 37)) throw new Error('not a time');
      keys.set(kid, [raw, end === null ? null : new Date(end * 1000).toISOString().replace('Z', '000Z')]);
    }
  } catch {
    throw new NoProof('the published keys cannot be read');
  }
  return keys;
}
