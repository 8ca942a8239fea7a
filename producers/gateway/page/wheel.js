// The geometry of a wheel of prizes, without a page. Angles are degrees, clockwise from the top, where the pointer is.

const SEGMENT_DEG_MIN = 3; // a prize of any chance stays visible
const FULL_DEG = 360;
const EDGE = 0.15; // of a segment, on both sides: a wheel does not rest on a line

/** The segments of a wheel, in the order of `prizes`.
 *  A segment is as wide as the prize's chance says. One below SEGMENT_DEG_MIN is widened, and the others make room.
 *  @param {{ code: string, chance: number }[]} prizes chances in any unit, 0 and more, one of them above 0
 *  @returns {{ code: string, from: number, to: number }[]} each begins where the one before ends, from 0 to 360 */
export function segmentsOf(prizes) {
  const least = Math.min(SEGMENT_DEG_MIN, FULL_DEG / (2 * prizes.length));
  const small = new Set();
  let perChance;
  for (let before = -1; small.size > before; ) {
    before = small.size;
    const others = prizes.filter((prize) => !small.has(prize));
    const sum = others.reduce((total, { chance }) => total + chance, 0);
    perChance = (FULL_DEG - small.size * least) / sum;
    for (const prize of others) if (prize.chance * perChance < least) small.add(prize);
  }
  let end = 0;
  return prizes.map((prize, index) => {
    const from = end;
    end = index === prizes.length - 1 ? FULL_DEG : from + (small.has(prize) ? least : prize.chance * perChance);
    return { code: prize.code, from, to: end };
  });
}

/** The path of a segment, from the centre, for the attribute `d`. */
export function pathOf({ from, to }, radius) {
  const [startX, startY] = pointAt(from, radius);
  if (to - from >= FULL_DEG) {
    const [farX, farY] = pointAt(from + FULL_DEG / 2, radius); // an arc cannot end where it begins
    const arc = `A${radius} ${radius} 0 1 1`;
    return `M${startX} ${startY}${arc} ${farX} ${farY}${arc} ${startX} ${startY}Z`;
  }
  const [endX, endY] = pointAt(to, radius);
  const isLarge = to - from > FULL_DEG / 2 ? 1 : 0;
  return `M0 0L${startX} ${startY}A${radius} ${radius} 0 ${isLarge} 1 ${endX} ${endY}Z`;
}

/** How far the wheel is turned when it rests on a segment; `share`, from 0 to 1, chooses the place in it. */
export function restOn({ from, to }, share) {
  const under = from + (EDGE + (1 - 2 * EDGE) * share) * (to - from);
  return modulo(-under, FULL_DEG);
}

/** The remainder of a division, never negative. */
export const modulo = (value, by) => ((value % by) + by) % by;

function pointAt(angle, radius) {
  const radians = (angle * Math.PI) / 180;
  return [radius * Math.sin(radians), -radius * Math.cos(radians)].map((it) => Number(it.toFixed(3)));
}
