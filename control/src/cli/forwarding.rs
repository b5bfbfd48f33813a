//! The engine that forwards for `run` and `attach`: the daemon's, if a daemon of landfall runs, or one in this process.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use landfall_engine::opener::client::Target;

use super::args::{Common, Ring};
use super::exit::{Exit, Failure};
use crate::cli::foreground::native_driver::Sink;
use crate::cli::foreground::registered::{DesiredContainer, RegisterError, Registered};
use crate::cli::foreground::{ForwardError, Options, Session, Wakeup};
use crate::cli::ui::output::{Printer, Report};
use crate::daemon::rpc::client::Client;
use crate::model::registration::AttachMethod;
use crate::sys::event_loop::{Signals, Watched};
use crate::sys::paths::Home;

/// The forwarding of one namespace.
pub enum Forwarding {
    /// By an engine in this process.
    Own(Box<Session>),
    /// By the daemon's engine, which outlives this process.
    Daemon(Box<Registered>),
}

impl Forwarding {
    /// Registers `attach_method` with the daemon, if one runs and may be used; otherwise forwards from `target` in this
    /// process. `native` states that a supervisor will report native sockets.
    ///
    /// # Errors
    /// The failure that `refused` returns for an engine that does not forward, or a name that is in use.
    pub fn open(
        target: Target,
        attach_method: Option<AttachMethod>,
        name: String,
        common: &Common,
        native: bool,
        printer: Printer,
        refused: impl FnOnce(&ForwardError) -> Failure,
    ) -> Result<Forwarding, Failure> {
        if let Some(attach_method) = attach_method.filter(|_| !common.no_daemon && common.ring == Ring::Auto)
        {
            let name_is_given = common.name.is_some();
            let desired = DesiredContainer {
                name: name.clone(),
                name_is_given,
                attach_method,
                policy: common.policy(),
                printer,
                native,
            };
            if let Some(registered) = register_with_daemon(desired)? {
                return Ok(Forwarding::Daemon(Box::new(registered)));
            }
        }
        let options = Options { name, policy: common.policy(), ring: common.ring, printer, native };
        let session = Session::open(target, options).map_err(|error| refused(&error))?;
        Ok(Forwarding::Own(Box::new(session)))
    }

    /// Returns the sink for the events of a native-socket supervisor.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn native_events(&self) -> io::Result<Sink> {
        match self {
            Forwarding::Own(session) => Ok(session.native_events()),
            Forwarding::Daemon(registered) => registered.native_events(),
        }
    }

    /// Starts to report signals and the ends of processes.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn watch(&self, signals: Signals, pidfds: BTreeMap<Watched, OwnedFd>) -> io::Result<()> {
        match self {
            Forwarding::Own(session) => session.watch(signals, pidfds),
            Forwarding::Daemon(registered) => registered.watch(signals, pidfds),
        }
    }

    /// Forwards until an event occurs that the verb handles, or `tick` has passed.
    pub fn next(&mut self, tick: Option<Duration>) -> Wakeup {
        match self {
            Forwarding::Own(session) => session.next(tick),
            Forwarding::Daemon(registered) => registered.next(tick),
        }
    }

    /// Like [`Forwarding::next`], after the engine is lost.
    pub fn next_without_engine(&mut self) -> Wakeup {
        match self {
            Forwarding::Own(session) => session.next_without_engine(),
            Forwarding::Daemon(registered) => registered.next(None),
        }
    }

    /// Lets open connections finish for at most `patience`, then ends.
    pub fn close(self, patience: Duration) {
        match self {
            Forwarding::Own(session) => session.close(patience),
            Forwarding::Daemon(registered) => registered.close(patience),
        }
    }
}

/// Registers with the daemon. Returns `None` without a message if no daemon runs, and with a note if the daemon
/// refuses.
fn register_with_daemon(desired: DesiredContainer) -> Result<Option<Registered>, Failure> {
    let printer = desired.printer;
    let Some(home) = Home::from_environment().ok().filter(|home| home.socket().exists()) else {
        return Ok(None);
    };
    match Registered::open(Client::new(home.socket()), desired) {
        Ok(registered) => Ok(Some(registered)),
        Err(RegisterError::NoDaemon) => Ok(None),
        Err(taken @ RegisterError::NameTaken { .. }) => {
            let failure = Failure::new(Exit::Refused, taken.to_string());
            Err(failure.hint("choose another --name; landfall ls shows the names in use"))
        }
        Err(RegisterError::Refused(why)) => {
            let text =
                format!("the daemon does not forward this ({why}); this process forwards it until it ends");
            printer.report(&Report::Note { text, hint: None });
            Ok(None)
        }
    }
}
