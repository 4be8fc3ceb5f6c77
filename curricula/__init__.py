"""What to draw next: which domain, then which prompt, by how much a group of it would teach.

`catalogue` numbers the prompts, `state` holds what is known of each, `buckets` and `pool` sort
them by difficulty, `mixture` shares draws among domains, `sampler` picks.
"""
