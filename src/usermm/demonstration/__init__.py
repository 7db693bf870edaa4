"""The hazard and the cure, as small programs to read: what ``usermm demo`` runs.

`caches` is the lesson (the same cache without and with notifications), `churn` the loop that tells them apart,
`slow_motion` the single case step by step, `workbench` the file and the buffers, `record` what was observed.
Nothing here prints.
"""
