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

/// An error and its causes in one line, without the numbers that the standard library puts behind what the kernel
/// says: `Permission denied (os error 13)` tells nobody more than `Permission denied`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = without_numbers(&error.to_string());
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = without_numbers(&error.to_string());
        // Some errors tell their cause themselves.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

/// Takes ` (os error N)` out of a message.
fn without_numbers(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(" (os error ") {
        clean.push_str(before);
        rest = after.split_once(')').map_or("", |(_, rest)| rest);
    }
    clean.push_str(rest);
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn what_the_kernel_says_is_told_without_its_number() {
        assert_eq!(chain(&io::Error::from_raw_os_error(13)), "Permission denied");
        assert_eq!(without_numbers("a (os error 1): b (os error 2)"), "a: b");
        assert_eq!(without_numbers("a (os error"), "a (os error");
    }
}
