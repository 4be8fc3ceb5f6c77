"""How difficult is a prompt for a model, and which prompts are worth training on.

`estimators` turns counts into figures, `labels` decides when enough has been sampled, `judge`
samples a critic until it has, `selection` keeps or drops.
"""
