import sys
from pathlib import Path

# compare.py is a script beside its modules: tests import them as it does
sys.path.insert(0, str(Path(__file__).parent))
