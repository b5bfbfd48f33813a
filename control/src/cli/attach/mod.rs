//! `landfall attach`: forwards what listens in a namespace that exists already, or has the daemon forward a container.

mod container;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use landfall_engine::opener::FailureKind;
use landfall_engine::opener::client::{OpenError, Target};
use rustix::process::{Pid, PidfdFlags};

use super::args::{AttachArgs, TargetArgs};
use super::exit::{Exit, Failure};
use super::forwarding::Forwarding;
use super::register;
use crate::cli::foreground::{ForwardError, Wakeup};
use crate::cli::ui::output::{Report, Talk};
use crate::error::chain;
use crate::model::name;
use crate::model::registration::AttachMethod;
use crate::sys::event_loop::{Signals, Watched};
use crate::sys::paths::identity_of_file;
use crate::sys::processes;
use nix::sys::signal::Signal;

/// How long connections may go on after the namespace is gone or somebody asked us to end.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the file of a namespace is looked at; nothing tells of its end.
const TICK: Duration = Duration::from_secs(1);

/// Forwards until it is told to end, or the namespace is gone.
pub fn attach(args: AttachArgs) -> Result<Exit, Failure> {
    if let Some(name) = &args.target.container {
        return container::attach(name, &args);
    }
    let talk = Talk::to_stdout(args.common.json);
    let signals = Signals::block().map_err(|error| other(&error))?;
    let place = Place::of(&args.target)?;
    let target = place.target()?;
    let mut pidfds = BTreeMap::new();
    if let Place::Process(pid) = place {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| place.gone())?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|_| place.gone())?;
        pidfds.insert(Watched::Target, pidfd);
    }
    let name = args.common.name.clone().unwrap_or_else(|| place.name());
    let identity = place.identity();
    let refused = |error: &ForwardError| place.refused(error);
    let mut session =
        Forwarding::open(target, place.attach_method(), name, &args.common, false, talk, refused)?;
    session.watch(signals, pidfds).map_err(|error| other(&error))?;

    let tick = matches!(place, Place::Path(_)).then_some(TICK);
    let reason = loop {
        match session.next(tick) {
            Wakeup::Signal(Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT, _) => {
                break None;
            }
            Wakeup::Signal(..) => {}
            Wakeup::Ended(_) => break Some(format!("{place} has ended")),
            Wakeup::Tick if place.identity() == identity => {}
            Wakeup::Tick => break Some(format!("{place} is gone")),
            Wakeup::Lost(reason) => return Err(Failure::new(Exit::Failed, reason)),
        }
    };
    session.close(PATIENCE);
    if let Some(text) = reason {
        talk.report(&Report::Note { text, hint: None });
    }
    Ok(Exit::Ok)
}

/// Which namespace.
#[derive(Clone, Debug)]
enum Place {
    Process(u32),
    Path(PathBuf),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Process(pid) => write!(f, "process {pid}"),
            Place::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Place {
    fn of(args: &TargetArgs) -> Result<Place, Failure> {
        match (args.pid, &args.netns) {
            (Some(pid), _) => Ok(Place::Process(pid.get())),
            (None, Some(path)) => Ok(Place::Path(path.clone())),
            (None, None) => Err(Failure::new(Exit::Usage, "neither --pid nor --netns is given")),
        }
    }

    fn target(&self) -> Result<Target, Failure> {
        match self {
            Place::Process(pid) => Target::process(*pid),
            Place::Path(path) => Target::path(path),
        }
        .map_err(|error| self.not_opened(&error))
    }

    /// The same for the daemon, if it would mean the same there.
    fn attach_method(&self) -> Option<AttachMethod> {
        match self {
            Place::Process(pid) => register::process(NonZeroU32::new(*pid)?).ok(),
            Place::Path(path) => register::netns(path).ok(),
        }
    }

    fn name(&self) -> String {
        match self {
            Place::Process(pid) => match processes::process_name(*pid) {
                Some(process) => name::sanitise(&process),
                None => format!("pid-{pid}"),
            },
            Place::Path(path) => name::sanitise(&file_name(path)),
        }
    }

    /// Device and inode of the file that stands for the namespace.
    fn identity(&self) -> Option<(u64, u64)> {
        match self {
            Place::Process(_) => None,
            Place::Path(path) => identity_of_file(path),
        }
    }

    fn gone(&self) -> Failure {
        Failure::new(Exit::Missing, format!("{self} does not exist")).hint(match self {
            Place::Process(_) => "give the id of a process that runs, as ps shows it",
            Place::Path(_) => "`ip netns list` shows namespaces by name; their files are in /run/netns",
        })
    }

    fn refused(&self, error: &ForwardError) -> Failure {
        match error {
            ForwardError::Open(error) => self.not_opened(error),
            ForwardError::Engine(_) | ForwardError::Thread(_) | ForwardError::Lost(_) => other(error),
        }
    }

    fn not_opened(&self, error: &OpenError) -> Failure {
        match error.kind() {
            Some(FailureKind::Gone) => self.gone(),
            Some(FailureKind::Unsupported) if self.identity().is_none() => self.gone(),
            Some(FailureKind::NotPermitted) => {
                Failure::new(Exit::Denied, format!("not permitted to enter the network namespace of {self}"))
                    .hint("run landfall as root, or as the user who made the namespace")
            }
            Some(FailureKind::OwnNamespace) => {
                Failure::new(Exit::Failed, format!("{self} is in this very network namespace"))
                    .hint("what listens there answers on localhost already; nothing needs forwarding")
            }
            _ => Failure::new(Exit::Failed, format!("cannot attach to {self}: {}", chain(error)))
                .hint("it takes a process, or a file such as /run/netns/NAME or /proc/PID/ns/net"),
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_else(|| "netns".to_owned())
}

fn other(error: &dyn std::error::Error) -> Failure {
    Failure::new(Exit::Failed, chain(error))
}
