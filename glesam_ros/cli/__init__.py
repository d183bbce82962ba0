"""The command line `glesam`; one module a command."""

from glesam_ros import keep_openblas_on_one_thread

keep_openblas_on_one_thread()
