//! Exit codes, and the errors that end a verb. The codes are part of the interface; `landfall --help` tells them.

use std::process::ExitCode;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: done as asked.
    Ok,
    /// 1: `doctor` found that forwarding does not work here.
    Unfit,
    /// 2: the command line makes no sense.
    Usage,
    /// 3: no such container, process or namespace.
    Missing,
    /// 4: not permitted.
    Denied,
    /// 5: no daemon runs, or none could be started or reached.
    NoDaemon,
    /// 6: the daemon refused, or what it was asked for failed.
    Refused,
    /// 124: the answer did not come in time, as `timeout` has it.
    TimedOut,
    /// 125: landfall itself failed. This and the next two are as `env`, `timeout` and `docker run` have them.
    Failed,
    /// 126: the command exists and cannot be executed.
    NotExecutable,
    /// 127: there is no such command.
    NotFound,
    /// The command's own exit code.
    Command(u8),
    /// 128 + N: signal N ended the command, as shells tell it.
    Signal(u8),
}

impl Exit {
    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Exit::Ok => 0,
            Exit::Unfit => 1,
            Exit::Usage => 2,
            Exit::Missing => 3,
            Exit::Denied => 4,
            Exit::NoDaemon => 5,
            Exit::Refused => 6,
            Exit::TimedOut => 124,
            Exit::Failed => 125,
            Exit::NotExecutable => 126,
            Exit::NotFound => 127,
            Exit::Command(code) => code,
            Exit::Signal(signal) => signal.saturating_add(128),
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

/// What ends a verb early: one line that names what was wrong, what to do about it, and the exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What was wrong; one line without a full stop.
    pub message: String,
    /// What to do, where there is something to do.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into(), hint: None }
    }

    /// Adds what to do.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Failure {
        Failure { hint: Some(hint.into()), ..self }
    }
}
