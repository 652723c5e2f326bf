"""Typed configuration of a run. Imports storage and errors; needs no torch.

sections.py   data, schedule and averages sections, and the base class of all sections
schema.py     RunConfig with the other sections and the checks between keys
loading.py    defaults, YAML file and --set; error messages with file, line and nearest key
warmup.py     the warm-up steps of a run, without importing the schema
recipes.py    the included configurations (configs/*.yaml)
schedules.py  learning rate and block size as functions of the step
"""
