"""Conformity: do the draws that were made for players come as often as their odds say?

Every pull has exact chances under what its notes record: tier, and counters of guarantees. The prize that its ticket
said, before sold-out stock and limits, is compared with them, so guarantees, tiers and stock bend no test. Sums of
(observed - chance) are martingales with the variance sum p(1 - p), whatever a pull's chances depend on.

| file | does |
| --- | --- |
| `tails` | probabilities: chi-squared, binomial, sums of unequal chances |
| `chances` | what a pull is compared with, and which prizes count as wins |
| `tally` | pulls added up: by state, hour and caller, and by account |
| `counting` | adds up sealed blocks, in steps of its own with its own mark |
| `reading` | what was counted of a version in a period |
| `tickets` | the tickets of draws whose secret is known |
| `questions` | the tests of one version |
| `report` | all versions of a campaign, family-wise by Holm |
| `nightly` | every night's reports, on record |
"""
