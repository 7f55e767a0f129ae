"""Ray, the command line, and what people see. The only package that imports ray."""
