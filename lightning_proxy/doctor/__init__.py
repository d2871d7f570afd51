"""What keeps an installation from learning: looks at everything, changes nothing.

``examine``   all checks, in the order of the data's way round (read this first)
``finding``   what a check says
``machine``   files, room on disk, packages
``served``    the proxy, and the engine behind it
``recorded``  calls, rewards, runs, and what a pass would find

May import errors, config, store, client and trainer (the latter looks, and takes nothing).
"""

from lightning_proxy.doctor.examine import examine
from lightning_proxy.doctor.finding import Finding, Level

__all__ = ["Finding", "Level", "examine"]
