"""One module for each kind of adapter that PEFT knows and a merge can hold."""
