//! `landfall attach`: forwards the ports of an existing namespace, or registers a Docker container with the daemon.

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
use crate::cli::ui::output::{Printer, Report};
use crate::error::chain;
use crate::model::name;
use crate::model::registration::AttachMethod;
use crate::sys::event_loop::{Signals, Watched};
use crate::sys::paths::identity_of_file;
use crate::sys::processes;
use nix::sys::signal::Signal;

/// The time for connections to finish after the namespace is gone or a signal has arrived.
const DRAIN_MAX: Duration = Duration::from_secs(1);
/// The interval between checks of a namespace file; the kernel has no notification for its removal.
const TICK: Duration = Duration::from_secs(1);

/// Forwards until a signal arrives or the namespace is gone.
pub fn attach(args: AttachArgs) -> Result<Exit, Failure> {
    if let Some(name) = &args.target.container {
        return container::attach(name, &args);
    }
    let printer = Printer::to_stdout(args.common.json);
    let signals = Signals::block().map_err(|error| unexpected_failure(&error))?;
    let namespace = Namespace::of(&args.target)?;
    let target = namespace.target()?;
    let mut pidfds = BTreeMap::new();
    if let Namespace::Process(pid) = namespace {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| namespace.missing())?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|_| namespace.missing())?;
        pidfds.insert(Watched::Target, pidfd);
    }
    let name = args.common.name.clone().unwrap_or_else(|| namespace.name());
    let identity = namespace.identity();
    let refused = |error: &ForwardError| namespace.forward_failure(error);
    let mut session =
        Forwarding::open(target, namespace.attach_method(), name, &args.common, false, printer, refused)?;
    session.watch(signals, pidfds).map_err(|error| unexpected_failure(&error))?;

    let tick = matches!(namespace, Namespace::Path(_)).then_some(TICK);
    let reason = loop {
        match session.next(tick) {
            Wakeup::Signal(Signal::SIGINT | Signal::SIGTERM | Signal::SIGHUP | Signal::SIGQUIT, _) => {
                break None;
            }
            Wakeup::Signal(..) => {}
            Wakeup::Ended(_) => break Some(format!("{namespace} has ended")),
            Wakeup::Tick if namespace.identity() == identity => {}
            Wakeup::Tick => break Some(format!("{namespace} is gone")),
            Wakeup::Lost(reason) => return Err(Failure::new(Exit::Failed, reason)),
        }
    };
    session.close(DRAIN_MAX);
    if let Some(text) = reason {
        printer.report(&Report::Note { text, hint: None });
    }
    Ok(Exit::Ok)
}

/// The namespace that is attached to.
#[derive(Clone, Debug)]
enum Namespace {
    Process(u32),
    Path(PathBuf),
}

impl std::fmt::Display for Namespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Namespace::Process(pid) => write!(f, "process {pid}"),
            Namespace::Path(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Namespace {
    fn of(args: &TargetArgs) -> Result<Namespace, Failure> {
        match (args.pid, &args.netns) {
            (Some(pid), _) => Ok(Namespace::Process(pid.get())),
            (None, Some(path)) => Ok(Namespace::Path(path.clone())),
            (None, None) => Err(Failure::new(Exit::Usage, "neither --pid nor --netns is given")),
        }
    }

    fn target(&self) -> Result<Target, Failure> {
        match self {
            Namespace::Process(pid) => Target::process(*pid),
            Namespace::Path(path) => Target::path(path),
        }
        .map_err(|error| self.open_failure(&error))
    }

    /// Returns the attach method for the daemon, unless the path refers to another namespace there.
    fn attach_method(&self) -> Option<AttachMethod> {
        match self {
            Namespace::Process(pid) => register::process(NonZeroU32::new(*pid)?).ok(),
            Namespace::Path(path) => register::netns(path).ok(),
        }
    }

    fn name(&self) -> String {
        match self {
            Namespace::Process(pid) => match processes::process_name(*pid) {
                Some(process) => name::sanitise(&process),
                None => format!("pid-{pid}"),
            },
            Namespace::Path(path) => name::sanitise(&file_name(path)),
        }
    }

    /// Returns device and inode of the namespace file.
    fn identity(&self) -> Option<(u64, u64)> {
        match self {
            Namespace::Process(_) => None,
            Namespace::Path(path) => identity_of_file(path),
        }
    }

    fn missing(&self) -> Failure {
        Failure::new(Exit::Missing, format!("{self} does not exist")).hint(match self {
            Namespace::Process(_) => "give the id of a running process, as ps shows it",
            Namespace::Path(_) => "`ip netns list` shows namespaces by name; their files are in /run/netns",
        })
    }

    fn forward_failure(&self, error: &ForwardError) -> Failure {
        match error {
            ForwardError::Open(error) => self.open_failure(error),
            ForwardError::Engine(_) | ForwardError::Thread(_) | ForwardError::Lost(_) => {
                unexpected_failure(error)
            }
        }
    }

    fn open_failure(&self, error: &OpenError) -> Failure {
        match error.kind() {
            Some(FailureKind::Gone) => self.missing(),
            Some(FailureKind::Unsupported) if self.identity().is_none() => self.missing(),
            Some(FailureKind::NotPermitted) => {
                Failure::new(Exit::Denied, format!("not permitted to enter the network namespace of {self}"))
                    .hint("run landfall as root, or as the user who made the namespace")
            }
            Some(FailureKind::OwnNamespace) => {
                Failure::new(Exit::Failed, format!("{self} is in the network namespace of landfall itself"))
                    .hint("its ports already answer on localhost without forwarding")
            }
            _ => Failure::new(Exit::Failed, format!("cannot attach to {self}: {}", chain(error)))
                .hint("give a process, or a file such as /run/netns/NAME or /proc/PID/ns/net"),
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_else(|| "netns".to_owned())
}

fn unexpected_failure(error: &dyn std::error::Error) -> Failure {
    Failure::new(Exit::Failed, chain(error))
}
