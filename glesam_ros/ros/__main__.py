"""`python -m glesam_ros.ros`: the perception node."""

import sys

from glesam_ros.ros.process import main

sys.exit(main())
