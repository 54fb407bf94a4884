"""Tests of the pages; a package, as some modules are named as those of other rooms are."""
