"use strict";
/* The explorer's numbers and texts. Numbers stay base64 until they are looked at. */

const ARRAYS = {
  f4: Float32Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i1: Int8Array, u8: BigUint64Array,
};

/** Numbers begin … end - 1 of a base64 text that holds numbers of one type; only what is needed is decoded. */
function decoded(base64, type, begin, end) {
  const size = Number(type[1]);
  const [first, last] = [begin * size, end * size];
  const bytes = atob(base64.slice(Math.floor(first / 3) * 4, Math.ceil(last / 3) * 4));
  const skipped = first % 3;
  const out = new Uint8Array(last - first);
  for (let i = 0; i < out.length; i++) out[i] = bytes.charCodeAt(i + skipped);
  return new ARRAYS[type](out.buffer);
}

/** The places of the texts that have all words, in any order; "#12" is the example of that number. */
function matching(query, lowered, numbers) {
  const wanted = query.trim().toLowerCase();
  const number = /^#\s*(\d+)$/.exec(wanted);
  const words = wanted.split(/\s+/).filter(Boolean);
  const found = [];
  for (let i = 0; i < lowered.length; i++) {
    if (number ? numbers[i] === Number(number[1]) : words.every((word) => lowered[i].includes(word))) found.push(i);
  }
  return found;
}

/** A text in parts, [[text, whether it is one of the words], …]. */
function marked(text, words) {
  const wanted = words.filter(Boolean).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  if (!wanted.length) return [[text, false]];
  return text.split(new RegExp(`(${wanted.join("|")})`, "i")).map((part, i) => [part, i % 2 === 1]);
}

/** A number in at most four digits. */
function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

const data = JSON.parse(document.getElementById("data").textContent);

/** Row i of packed numbers, or numbers begin … end - 1. */
function row(packed, i) {
  return numbersOf(packed, i * packed.width, (i + 1) * packed.width);
}
function numbersOf(packed, begin, end) {
  packed.text ??= document.getElementById(packed.id).textContent;
  return decoded(packed.text, packed.type, begin, end);
}

const kinds = {
  examples: { texts: data.pieces ? data.pieces.map((one, i) => one.join("") + data.texts[i]) : data.texts },
  queries: { texts: data.queries ?? [] },
};
kinds.examples.numbers = Array.from(numbersOf(data.number, 0, data.count), Number);
kinds.queries.numbers = kinds.queries.texts.map((_, i) => i);
for (const [name, kind] of Object.entries(kinds)) {
  kind.lowered = kind.texts.map((text) => text.toLowerCase());
  kind.views = data.views.filter((view) => view.of === name);
  kind.chosen = [0, Math.floor(kind.views.length / 2)]; // the second measure, or the other run
}
const present = Object.keys(kinds).filter((name) => kinds[name].views.length);

/** What was found for item i under a view: two lists, [{example, score, pair}, …]. */
function listsOf(view, i) {
  const [indices, values] = [row(view.indices, i), row(view.values, i)];
  const all = Array.from(indices, (example, pair) => ({ example, score: values[pair], pair }));
  return [all.slice(0, view.k), all.slice(view.k)];
}

/** Each token's part of the score of a pair, from -1 to 1, and the largest; null where nothing is known of tokens. */
function tokensOf(view, i, lists, pair) {
  if (!view.tokens) return null;
  const length = (one) => data.pieces[one.example].length;
  const before = lists.flat().slice(0, pair).reduce((sum, one) => sum + length(one), 0);
  const begin = Number(numbersOf(view.begins, i, i + 1)[0]) + before;
  const steps = numbersOf(view.tokens, begin, begin + length(lists.flat()[pair]));
  return { steps: Array.from(steps, (step) => step / 127), largest: row(view.largest, i)[pair] };
}
