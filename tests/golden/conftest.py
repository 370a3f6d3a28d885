import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for golden.py, which tests of this folder share
