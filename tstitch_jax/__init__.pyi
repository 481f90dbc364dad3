"""The public names, each loaded at its first use. Type checkers read the same list."""

from . import evaluation as evaluation, training as training
from .core.denoisers import (
    as_denoiser as as_denoiser,
    at_equal_snr as at_equal_snr,
    by_rows as by_rows,
    stitch as stitch,
    with_cond as with_cond,
    without_variance as without_variance,
)
from .core.grids import (
    SPACINGS as SPACINGS,
    last_steps as last_steps,
    make_knots as make_knots,
    match_snr as match_snr,
    respace as respace,
)
from .core.guidance import (
    autoguide as autoguide,
    cfg as cfg,
    guidance_interval as guidance_interval,
)
from .core.loop import (
    Step as Step,
    draw_noise as draw_noise,
    image_keys as image_keys,
    iterate as iterate,
    run as run,
)
from .core.plan import (
    Plan as Plan,
)
from .core.schedules import (
    make_schedule as make_schedule,
)
from .core.solvers import (
    SOLVERS as SOLVERS,
    ddim as ddim,
    ddpm as ddpm,
    dpmpp as dpmpp,
    dpmpp_sde as dpmpp_sde,
    euler as euler,
    euler_ancestral as euler_ancestral,
    flow_heun as flow_heun,
    heun as heun,
    lcm as lcm,
    make_solver as make_solver,
    pndm as pndm,
    sde as sde,
    unipc as unipc,
)
from .core.types import (
    Condition as Condition,
    Denoiser as Denoiser,
    Knots as Knots,
    Prediction as Prediction,
    Schedule as Schedule,
    Solver as Solver,
    record as record,
    static as static,
)
from .evaluation import (
    Evaluation as Evaluation,
    evaluate as evaluate,
)
from .hub.resolve import (
    load as load,
)
from .jobs.calibrate import (
    Calibration as Calibration,
    Choice as Choice,
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
    SweepConfig as SweepConfig,
    sweep as sweep,
)
from .models.build import (
    make_network as make_network,
)
from .models.cards import (
    AutoencoderCard as AutoencoderCard,
    Card as Card,
    FeatureCard as FeatureCard,
    TextEncoderCard as TextEncoderCard,
)
from .models.devices import (
    make_mesh as make_mesh,
    shard as shard,
)
from .models.families import (
    Family as Family,
    register as register,
)
from .models.store import (
    save as save,
)
from .models.types import (
    Autoencoder as Autoencoder,
    FeatureNetwork as FeatureNetwork,
    Features as Features,
    Network as Network,
    TextEncoder as TextEncoder,
    Tokenizer as Tokenizer,
)
from .sampling.options import (
    Guidance as Guidance,
)
from .sampling.sampler import (
    Sampler as Sampler,
    sample as sample,
)
from .sampling.samples import (
    Samples as Samples,
)

__version__: str
