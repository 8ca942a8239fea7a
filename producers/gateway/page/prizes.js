// Prizes and outcomes in words, without a page. A campaign is an answer of GET /v1/campaigns/{name}, a result one of
// GET /v1/draws/{session}.

export const NO_PRIZE = 'No prize';
const LABEL_LENGTH_MAX = 9; // on the wheel

/** An amount without decimals that say nothing: 5 for 5.00. */
export const short = (amount) => amount.replace(/\.00$/, '');

/** What a player reads: the prize's title, what it pays in the campaign's asset, or its code. */
export function nameOf(prize, campaign) {
  const paid = paidAlone(prize, campaign);
  if (paid) return `${paid.amount} ${paid.asset_code}`;
  return prize.title || (prize.grants.length ? prize.code : NO_PRIZE);
}

/** The prizes of a campaign for the wheel: [{ code, chance, label, isPrize }]. */
export function onWheel(campaign) {
  return campaign.prizes.map((prize) => {
    const paid = paidAlone(prize, campaign);
    const label = paid ? short(paid.amount) : nameOf(prize, campaign);
    return {
      code: prize.code,
      chance: prize.chance.numerator / prize.chance.denominator,
      label: label.length > LABEL_LENGTH_MAX ? `${label.slice(0, LABEL_LENGTH_MAX - 1)}…` : label,
      isPrize: prize.grants.length > 0,
    };
  });
}

// The grant of a prize without a title that is one amount of the campaign's asset.
function paidAlone({ title, grants }, { asset_code }) {
  return !title && grants.length === 1 && grants[0].asset_code === asset_code ? grants[0] : null;
}

/** What each pull of a completed result came to: [{ pull, code, name, isPrize, codes }], `codes` being what was handed
 *  out to type in elsewhere. `campaign` is null where it is not known. */
export function outcomesOf(result, campaign) {
  if (result.v === 1) {
    const isPrize = Number(result.prize_amount) > 0;
    const name = isPrize ? [result.prize_amount, campaign?.asset_code].filter(Boolean).join(' ') : NO_PRIZE;
    return [{ pull: 1, code: result.prize_amount, name, isPrize, codes: [] }]; // the code of a prize of `default`
  }
  return result.prizes.map(({ pull, code, grants }) => {
    const isPrize = grants.length > 0;
    const prize = campaign?.prizes.find((it) => it.code === code);
    const name = prize ? nameOf(prize, campaign) : isPrize ? code : NO_PRIZE;
    return { pull, code, name, isPrize, codes: grants.map((it) => it.code).filter(Boolean) };
  });
}

/** The outcome on which the wheel stops: the rarest one. */
export function rarestOf(outcomes, campaign) {
  const chances = new Map((campaign ? onWheel(campaign) : []).map(({ code, chance }) => [code, chance]));
  const chanceOf = ({ code }) => chances.get(code) ?? 1;
  return outcomes.reduce((rarest, it) => (chanceOf(it) < chanceOf(rarest) ? it : rarest));
}

/** All outcomes of a completed result in a sentence. */
export function sentenceOf(outcomes) {
  const won = outcomes.filter((it) => it.isPrize);
  const count = outcomes.length;
  if (count > 1) return won.length ? `Won in ${won.length} of ${count} pulls` : `No prize in ${count} pulls`;
  return won.length ? `Won ${won[0].name}` : 'No prize this time';
}
