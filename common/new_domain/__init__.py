"""Lays out a new domain: a folder at the root that trains, distills, evaluates and reports from the first minute on.

`template/` is that domain, real code under the names example-domain and example_domain, checked like all other code.
"""
