"""Search: Optuna proposes trials, the packs of a study train them, the losers are ended early."""
