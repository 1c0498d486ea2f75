from .forecast.linear import LinearForecast as LinearForecast
from .forecast.linear import Trajectory as Trajectory
from .forecast.linear import forecast_linear as forecast_linear
from .forecast.moments import MomentForecast as MomentForecast
from .forecast.moments import forecast_moments as forecast_moments
from .forecast.order import OrderForecast as OrderForecast
from .forecast.order import best_order as best_order
from .forecast.penalty import QuadraticPenalty as QuadraticPenalty
from .forecast.result import Calibration as Calibration
from .forecast.result import Forecast as Forecast
from .forecast.sequence import SequenceForecast as SequenceForecast
from .forecast.sequence import forecast_sequence as forecast_sequence
from .forecast.training import SGD as SGD
from .forecast.training import AdamW as AdamW
from .forecast.training import GradientDescent as GradientDescent
from .forecast.training import GradientFlow as GradientFlow
from .forecast.training import Ridge as Ridge
from .protect.spectral import SpectralAnchor as SpectralAnchor
from .protect.spectral import SpectralProbe as SpectralProbe
from .protect.spectral import combined_penalty as combined_penalty
from .tangent.features import Features as Features
from .tangent.linear_head import LinearHead as LinearHead
from .tangent.moments import Moments as Moments

__version__: str
