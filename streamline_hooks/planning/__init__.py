"""What a run will take, before anything long is run; and what can be done in a time."""

from streamline_hooks.planning.plan import Asked, Plan, Stage, plan_blockwise
from streamline_hooks.planning.rates import Rates, h100, rates_here
from streamline_hooks.planning.training_budget import BudgetPlan
from streamline_hooks.planning.training_plan_here import plan_training
from streamline_hooks.planning.work import BlockWork, work_of

__all__ = [
    "Asked",
    "BlockWork",
    "BudgetPlan",
    "Plan",
    "Rates",
    "Stage",
    "h100",
    "plan_blockwise",
    "plan_training",
    "rates_here",
    "work_of",
]
