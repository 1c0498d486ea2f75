from .forecast.linear import LinearForecast as LinearForecast
from .forecast.linear import Trajectory as Trajectory
from .forecast.linear import forecast_linear as forecast_linear
from .forecast.result import Calibration as Calibration
from .forecast.result import Forecast as Forecast
from .forecast.training import SGD as SGD
from .forecast.training import AdamW as AdamW
from .forecast.training import GradientDescent as GradientDescent
from .forecast.training import GradientFlow as GradientFlow
from .forecast.training import Ridge as Ridge
from .tangent.features import Features as Features
from .tangent.linear_head import LinearHead as LinearHead
from .tangent.moments import Moments as Moments

__version__: str
