"""What a run block by block will take, before anything is read."""

from streamline_hooks.planning.plan import Asked, Plan, Stage, plan_blockwise
from streamline_hooks.planning.rates import Rates, h100, rates_here
from streamline_hooks.planning.work import BlockWork, work_of

__all__ = ["Asked", "BlockWork", "Plan", "Rates", "Stage", "h100", "plan_blockwise", "rates_here", "work_of"]
