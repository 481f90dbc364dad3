"""The public names, each loaded at its first use. Type checkers read the same list."""

from .core.grids import (
    SPACINGS as SPACINGS,
)
from .core.grids import (
    last_steps as last_steps,
)
from .core.grids import (
    make_knots as make_knots,
)
from .core.grids import (
    match_snr as match_snr,
)
from .core.grids import (
    respace as respace,
)
from .core.guidance import (
    autoguide as autoguide,
)
from .core.guidance import (
    cfg as cfg,
)
from .core.guidance import (
    guidance_interval as guidance_interval,
)
from .core.loop import (
    Step as Step,
)
from .core.loop import (
    draw_noise as draw_noise,
)
from .core.loop import (
    image_keys as image_keys,
)
from .core.loop import (
    iterate as iterate,
)
from .core.loop import (
    run as run,
)
from .core.plan import (
    Plan as Plan,
)
from .core.prediction import (
    as_denoiser as as_denoiser,
)
from .core.prediction import (
    at_equal_snr as at_equal_snr,
)
from .core.prediction import (
    with_cond as with_cond,
)
from .core.prediction import (
    without_variance as without_variance,
)
from .core.schedules import (
    make_schedule as make_schedule,
)
from .core.solvers import (
    SOLVERS as SOLVERS,
)
from .core.solvers import (
    ddim as ddim,
)
from .core.solvers import (
    ddpm as ddpm,
)
from .core.solvers import (
    dpmpp as dpmpp,
)
from .core.solvers import (
    dpmpp_sde as dpmpp_sde,
)
from .core.solvers import (
    euler as euler,
)
from .core.solvers import (
    euler_ancestral as euler_ancestral,
)
from .core.solvers import (
    flow_heun as flow_heun,
)
from .core.solvers import (
    heun as heun,
)
from .core.solvers import (
    lcm as lcm,
)
from .core.solvers import (
    make_solver as make_solver,
)
from .core.solvers import (
    pndm as pndm,
)
from .core.solvers import (
    sde as sde,
)
from .core.solvers import (
    unipc as unipc,
)
from .core.stitch import (
    stitch as stitch,
)
from .core.types import (
    Denoiser as Denoiser,
)
from .core.types import (
    Knots as Knots,
)
from .core.types import (
    Prediction as Prediction,
)
from .core.types import (
    Schedule as Schedule,
)
from .core.types import (
    Solver as Solver,
)
from .evaluation import (
    Evaluation as Evaluation,
)
from .evaluation import (
    evaluate as evaluate,
)
from .hub.resolve import (
    load as load,
)
from .jobs.calibrate import (
    Calibration as Calibration,
)
from .jobs.calibrate import (
    Choice as Choice,
)
from .jobs.calibrate import (
    calibrate as calibrate,
)
from .jobs.export import (
    export as export,
)
from .jobs.generate import (
    generate as generate,
)
from .jobs.sweep import (
    Point as Point,
)
from .jobs.sweep import (
    SweepConfig as SweepConfig,
)
from .jobs.sweep import (
    sweep as sweep,
)
from .models.cards import (
    AutoencoderCard as AutoencoderCard,
)
from .models.cards import (
    Card as Card,
)
from .models.cards import (
    FeatureCard as FeatureCard,
)
from .models.cards import (
    TextEncoderCard as TextEncoderCard,
)
from .models.devices import (
    make_mesh as make_mesh,
)
from .models.devices import (
    shard as shard,
)
from .models.store import (
    make_autoencoder as make_autoencoder,
)
from .models.store import (
    make_feature_network as make_feature_network,
)
from .models.store import (
    make_network as make_network,
)
from .models.store import (
    make_text_encoder as make_text_encoder,
)
from .models.store import (
    save as save,
)
from .models.types import (
    Autoencoder as Autoencoder,
)
from .models.types import (
    FeatureNetwork as FeatureNetwork,
)
from .models.types import (
    Features as Features,
)
from .models.types import (
    Network as Network,
)
from .models.types import (
    TextEncoder as TextEncoder,
)
from .models.types import (
    Tokenizer as Tokenizer,
)
from .sampling.sampler import (
    sample as sample,
)

__version__: str
