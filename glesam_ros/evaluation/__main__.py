"""`python -m glesam_ros.evaluation`."""

from glesam_ros.evaluation.evaluate import main

main()
