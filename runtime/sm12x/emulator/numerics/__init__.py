"""PTX arithmetic on bit arrays: formats, conversions, rounding, MMA, matrix fragments. Pure NumPy, no state.

Everything here takes and returns unsigned integer arrays that hold register bits, one element per lane, and
accepts leading axes (several warps or several instructions at once). A form that PTX does not have, or that
is not implemented, raises ``Unsupported`` when it is looked up, never at run time.
"""
