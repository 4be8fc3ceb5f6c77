"""`posttrain prune`: an SFT set judged by a critic, and what is worth learning kept.

The source is read twice, in chunks: once for its tasks, once to write the rows with what was
decided. In between everything is in one SQLite file, the store, so that an interrupted run goes on
and another threshold needs no new answers.
"""
