// The page /verify, behind verify.js in one script: shows what `verify` says of the proofs that are chosen or dropped.

const element = (id) => document.getElementById(id);
const MARKS = { [PROVEN]: 'proven', [NOT_YET]: 'open', [FALSE]: 'false', 'no proof': 'false' };
const SAID = { [PROVEN]: '✓ Proven', [NOT_YET]: '… Not provable yet', [FALSE]: '✗ False', 'no proof': '✗ No proof' };
const PROOF_BYTES_MAX = 16 * 1024 * 1024;

function made(tag, text = '', className = '') {
  const it = document.createElement(tag);
  it.textContent = text;
  if (className) it.className = className;
  return it;
}

/** What the player knows from elsewhere. */
function known() {
  const told = (id) => element(id).value.trim() || undefined;
  const receipts = (told('receipts') ?? '').split(/\s+/).filter(Boolean);
  return { anchor: told('anchor')?.toLowerCase(), keys: told('keys'), booksKey: told('books-key'), receipts };
}

async function reportOn(file) {
  try {
    if (file.size > PROOF_BYTES_MAX) throw new NoProof('it is larger than any proof');
    return await verify(await file.text(), known());
  } catch (error) {
    if (!(error instanceof NoProof)) throw error;
    return { session: null, verdict: 'no proof', claims: [], limits: [], error: error.message };
  }
}

function shown(report, name) {
  const article = made('article', '', MARKS[report.verdict]);
  const title = made('h2', report.session === null ? `${name} ` : `Draw ${report.session} `);
  title.append(made('span', SAID[report.verdict], 'verdict'));
  article.append(title);
  if (report.error) article.append(made('p', `This file is no proof of a draw: ${report.error}.`));
  const list = made('ol');
  for (const { title: said, verdict, words } of report.claims) {
    const item = made('li', '', `claim ${MARKS[verdict]}`);
    const head = made('h3', `${said}: `);
    head.append(made('span', SAID[verdict], 'verdict'));
    item.append(head, made('p', words));
    list.append(item);
  }
  if (report.claims.length) article.append(list);
  for (const words of report.limits) article.append(made('p', words, 'note'));
  return article;
}

let run = 0;

async function check(files) {
  run += 1;
  const mine = run;
  const counts = new Map();
  element('reports').replaceChildren();
  for (const [index, file] of files.entries()) {
    element('state').textContent = `Checking ${index + 1} of ${files.length}`;
    const report = await reportOn(file);
    if (mine !== run) return; // other files were chosen meanwhile
    counts.set(report.verdict, (counts.get(report.verdict) ?? 0) + 1);
    element('reports').append(shown(report, file.name));
  }
  const told = [...counts].map(([verdict, count]) => `${count} ${verdict}`).join(', ');
  element('state').textContent = files.length ? `Checked: ${told}.` : 'No proof is chosen.';
}

function begin() {
  if (location.protocol === 'file:') {
    element('programs').hidden = true;
    element('save').replaceWith('saved as a file');
  }
  if (!globalThis.crypto?.subtle) {
    element('state').textContent = 'Browsers calculate only on secure pages: save this page, and open the saved file.';
    return;
  }
  let chosen = [];
  const choose = (files) => {
    chosen = [...files];
    check(chosen);
  };
  const form = element('form');
  form.addEventListener('submit', (event) => event.preventDefault());
  element('proofs').addEventListener('change', (event) => choose(event.target.files));
  for (const id of ['receipts', 'anchor', 'keys', 'books-key']) {
    element(id).addEventListener('change', () => check(chosen));
  }
  document.addEventListener('dragover', (event) => {
    event.preventDefault();
    form.classList.add('over');
  });
  document.addEventListener('dragleave', () => form.classList.remove('over'));
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    form.classList.remove('over');
    choose(event.dataTransfer.files);
  });
}

begin();
