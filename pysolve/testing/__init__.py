"""Is a solver right? Hostile problems, and a judge in extended precision that trusts no solver.

The problem, for correlations R (d × d) and C (h × d), groups g of consecutive columns and weights w_g ≥ 0:

    min_M  P(M) = ½⟨M R, M⟩ − ⟨C, M⟩ + lam Σ_g w_g ‖M_g‖_F

``check_solver(solve)`` tries any function that claims to solve it. An answer is proven wrong by a better one:
from the answer and from starts of its own, the judge goes down by reweighted ridge fits in extended
precision; each of them is only a witness, whose P is then evaluated on the matrices that were given. Where
all groups are penalised, feasible points of the dual say how far down it could be at all.

``python -m pysolve.testing --seconds 60`` does so with the solvers of this package.
"""

from pysolve.testing.checks import Solve as Solve
from pysolve.testing.checks import check_solver as check_solver
from pysolve.testing.checks import judge_solver as judge_solver
from pysolve.testing.judge import Verdict as Verdict
from pysolve.testing.judge import judge as judge
from pysolve.testing.problems import HostileProblem as HostileProblem
from pysolve.testing.problems import hostile_problem as hostile_problem
from pysolve.testing.problems import hostile_problems as hostile_problems
