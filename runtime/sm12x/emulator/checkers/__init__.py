"""What a kernel must not do and no single access shows: one module for each kind of mistake."""
