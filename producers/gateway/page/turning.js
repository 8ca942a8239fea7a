// The wheel in the page: shows segments, turns, and comes to rest on one of them.

import { modulo, pathOf, restOn, segmentsOf } from './wheel.js';

const SVG = 'http://www.w3.org/2000/svg';
const RADIUS = 100;
const HUES = 5; // classes in style.css
const LABEL_DEG_MIN = 20; // a label needs so much room
const TURN_MS = 900;
const TURNS_AT_LEAST_MS = 900;
const STOP_DEG_MIN = 150;
const CALM_MS = 700; // with prefers-reduced-motion: a short wait instead of the turning wheel

export class Wheel {
  #node;
  #segments = [];
  #angle = 0;
  #turning = null;
  #began = 0;

  /** `node` is the group that turns, centred on 0, 0. */
  constructor(node) {
    this.#node = node;
  }

  get isTurning() {
    return this.#began > 0;
  }

  /** Show `prizes`, [{ code, chance, label, isPrize }], in their sizes. */
  show(prizes) {
    this.#segments = segmentsOf(prizes);
    let hue = 0;
    const groups = prizes.map(({ label, isPrize }, index) => {
      const group = document.createElementNS(SVG, 'g');
      group.setAttribute('class', isPrize ? `prize hue-${hue++ % HUES}` : 'blank');
      const path = document.createElementNS(SVG, 'path');
      path.setAttribute('d', pathOf(this.#segments[index], RADIUS));
      group.append(path);
      const { from, to } = this.#segments[index];
      if (isPrize && to - from >= LABEL_DEG_MIN) {
        const text = document.createElementNS(SVG, 'text');
        text.setAttribute('transform', `rotate(${(from + to) / 2})`);
        text.setAttribute('y', '-68');
        if (label.length > 3) text.setAttribute('class', 'long');
        text.textContent = label;
        group.append(text);
      }
      return group;
    });
    this.#node.replaceChildren(...groups);
  }

  /** Turn until `stop` or `halt`. */
  spin() {
    if (this.isTurning) return;
    this.#began = performance.now();
    if (matchMedia('(prefers-reduced-motion: reduce)').matches) return;
    const frames = [{ transform: `rotate(${this.#angle}deg)` }, { transform: `rotate(${this.#angle + 360}deg)` }];
    this.#turning = this.#node.animate(frames, { duration: TURN_MS, iterations: Infinity });
  }

  /** Come to rest on the segment of a prize, at once if the wheel has no such prize. Resolves when the wheel stands. */
  async stop(code) {
    await pause((this.#turning ? TURNS_AT_LEAST_MS : CALM_MS) - (performance.now() - this.#began));
    const segment = this.#segments.find((it) => it.code === code);
    if (!segment) {
      this.halt();
      return;
    }
    const rest = restOn(segment, Math.random());
    if (this.#turning) {
      const now = this.#angle + (360 * (performance.now() - this.#began)) / TURN_MS;
      const way = STOP_DEG_MIN + modulo(rest - now - STOP_DEG_MIN, 360);
      // The curve begins at three times its mean speed, so the wheel slows down from its present speed.
      const duration = (3 * way * TURN_MS) / 360;
      const frames = [{ transform: `rotate(${now}deg)` }, { transform: `rotate(${now + way}deg)` }];
      this.#node.animate(frames, { duration, easing: 'cubic-bezier(0.333, 1, 0.667, 1)', fill: 'forwards' });
      this.#turning.cancel();
      await pause(duration); // not until the animation's `finish` event, which hidden tabs do not get
    }
    this.halt(rest);
  }

  /** Stop at once, at `angle`. */
  halt(angle = this.#angle) {
    this.#angle = angle;
    for (const animation of this.#node.getAnimations()) animation.cancel();
    this.#node.style.transform = `rotate(${angle}deg)`;
    this.#turning = null;
    this.#began = 0;
  }
}

const pause = (ms) => new Promise((done) => setTimeout(done, Math.max(0, ms)));
