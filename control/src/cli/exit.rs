//! Exit codes, and the errors that end a verb. The codes are part of the interface; `landfall --help` lists them.

use std::process::ExitCode;

/// The exit status of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: success.
    Ok,
    /// 1: `doctor` found that forwarding does not work here.
    Unfit,
    /// 2: invalid command line.
    Usage,
    /// 3: no such container, process or namespace.
    Missing,
    /// 4: not permitted.
    Denied,
    /// 5: no daemon runs, or it could not be started or reached.
    NoDaemon,
    /// 6: the daemon refused the request, or the request failed.
    Refused,
    /// 124: no answer in time; the code that `timeout` uses.
    TimedOut,
    /// 125: landfall itself failed. `env`, `timeout` and `docker run` use this code and the next two in the same way.
    Failed,
    /// 126: the command exists and cannot be executed.
    NotExecutable,
    /// 127: the command does not exist.
    NotFound,
    /// The command's own exit code.
    Command(u8),
    /// 128 + N: signal N ended the command; the convention of shells.
    Signal(u8),
}

impl Exit {
    /// Returns the number.
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

/// An error that ends a verb: one line that names the problem, an optional hint, and the exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// The problem; one line without a full stop.
    pub message: String,
    /// The suggested action, if there is one.
    pub hint: Option<String>,
}

impl Failure {
    /// Returns a failure without a hint.
    pub fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into(), hint: None }
    }

    /// Adds a hint.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Failure {
        Failure { hint: Some(hint.into()), ..self }
    }
}
