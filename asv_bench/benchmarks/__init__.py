"""Benchmarks of gdr for airspeed velocity, one module a stem.

Parameters never depend on the machine: what a machine cannot run is skipped in ``setup`` (shown as n/a).  Inputs are
drawn, kernels compiled and pools filled in ``setup`` as well, outside what is measured.
"""
