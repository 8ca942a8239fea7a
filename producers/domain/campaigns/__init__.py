"""Campaigns, pure: the manifest that an operator writes, the odds that it says, drawing by them, and what they come to.

| file | says |
| --- | --- |
| `odds` | one version of a campaign: prizes, tiers, guarantees, limits, its hash |
| `built_in` | the odds of the campaign that needs no manifest, `default` |
| `manifest` | from TOML, or from a canonical form, to odds |
| `form`, `checks`, `lines` | a manifest's fields; what is right; where a mistake stands |
| `canonical` | from odds to the bytes that are hashed |
| `drawing` | from a seed, odds and a request to prizes |
| `words` | a guarantee as a sentence for players |
| `figures` | exact chances, expectations, deviations, how long stock lasts |
"""
