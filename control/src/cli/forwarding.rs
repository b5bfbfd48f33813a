//! Who forwards for `run` and `attach`: the daemon, where one of ours runs, or an engine of their own.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use landfall_engine::opener::client::Target;

use super::args::{Common, Ring};
use super::exit::{Exit, Failure};
use crate::cli::foreground::native_driver::Sink;
use crate::cli::foreground::registered::{DesiredContainer, Registered, Unregistered};
use crate::cli::foreground::{ForwardError, Options, Session, Wakeup};
use crate::cli::ui::output::{Report, Talk};
use crate::daemon::rpc::client::Client;
use crate::model::registration::AttachMethod;
use crate::sys::event_loop::{Signals, Watched};
use crate::sys::paths::Home;

/// One namespace that is forwarded.
pub enum Forwarding {
    /// By an engine in this process.
    Own(Box<Session>),
    /// By the daemon's engine, which outlives us.
    Daemons(Box<Registered>),
}

impl Forwarding {
    /// Registers `attach_method` with the daemon, if there is one and it may be used; else forwards from `target` here. With `native`, a
    /// supervisor reports native sockets.
    ///
    /// # Errors
    /// What `refused` makes of an engine that does not forward, or a name that is taken.
    pub fn open(
        target: Target,
        attach_method: Option<AttachMethod>,
        name: String,
        common: &Common,
        native: bool,
        talk: Talk,
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
                talk,
                native,
            };
            if let Some(registered) = by_daemon(desired)? {
                return Ok(Forwarding::Daemons(Box::new(registered)));
            }
        }
        let options = Options { name, policy: common.policy(), ring: common.ring, talk, native };
        let session = Session::open(target, options).map_err(|error| refused(&error))?;
        Ok(Forwarding::Own(Box::new(session)))
    }

    /// Takes the events of a supervisor of native sockets.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn native_events(&self) -> io::Result<Sink> {
        match self {
            Forwarding::Own(session) => Ok(session.native_events()),
            Forwarding::Daemons(registered) => registered.native_events(),
        }
    }

    /// Begins to tell of signals and of the ends of processes.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn watch(&self, signals: Signals, pidfds: BTreeMap<Watched, OwnedFd>) -> io::Result<()> {
        match self {
            Forwarding::Own(session) => session.watch(signals, pidfds),
            Forwarding::Daemons(registered) => registered.watch(signals, pidfds),
        }
    }

    /// Forwards until something happens that is the verb's business, or `tick` has passed.
    pub fn next(&mut self, tick: Option<Duration>) -> Wakeup {
        match self {
            Forwarding::Own(session) => session.next(tick),
            Forwarding::Daemons(registered) => registered.next(tick),
        }
    }

    /// The same, once the engine is lost.
    pub fn next_without_engine(&mut self) -> Wakeup {
        match self {
            Forwarding::Own(session) => session.next_without_engine(),
            Forwarding::Daemons(registered) => registered.next(None),
        }
    }

    /// Lets open connections finish for at most `patience`, and ends.
    pub fn close(self, patience: Duration) {
        match self {
            Forwarding::Own(session) => session.close(patience),
            Forwarding::Daemons(registered) => registered.close(patience),
        }
    }
}

/// Without a daemon there is nothing to say; one that does not forward this is told of.
fn by_daemon(desired: DesiredContainer) -> Result<Option<Registered>, Failure> {
    let talk = desired.talk;
    let Some(home) = Home::from_environment().ok().filter(|home| home.socket().exists()) else {
        return Ok(None);
    };
    match Registered::open(Client::new(home.socket()), desired) {
        Ok(registered) => Ok(Some(registered)),
        Err(Unregistered::NoDaemon) => Ok(None),
        Err(taken @ Unregistered::NameTaken { .. }) => {
            let failure = Failure::new(Exit::Refused, taken.to_string());
            Err(failure.hint("say another --name; landfall ls shows which ones there are"))
        }
        Err(Unregistered::Refused(why)) => {
            let text = format!(
                "the daemon does not forward this ({why}); it is forwarded from here, and ends with us"
            );
            talk.report(&Report::Note { text, hint: None });
            Ok(None)
        }
    }
}
