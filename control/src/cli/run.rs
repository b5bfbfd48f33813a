//! `landfall run`: a command in a network of its own, whose ports answer on the host's localhost.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use landfall_engine::opener::client::Target;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

use super::args::{Net, RunArgs};
use super::exit::{Exit, Failure};
use super::forwarding::Forwarding;
use super::native::NativeSockets;
use super::register;
use crate::cli::foreground::{ForwardError, Wakeup};
use crate::cli::ui::output::{Report, Talk};
use crate::error::chain;
use crate::model::name;
use crate::sys::event_loop::{Origin, Signals, Watched};
use crate::sys::sandbox::pasta::{self, Pasta, PastaError};
use crate::sys::sandbox::remains::Namespace;
use crate::sys::sandbox::{Sandbox, SandboxError, Step};

/// How long connections may go on after the command has ended: what it sent last may still be on its way.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long what the command left behind may take to end, once it is asked to.
const END_MAX: Duration = Duration::from_secs(3);

/// Runs the command; the exit code is the command's.
pub fn run(args: RunArgs) -> Result<Exit, Failure> {
    let talk = Talk::to_stderr(args.common.json);
    let name = args.common.name.clone().unwrap_or_else(name_of_directory);
    // Before the first thread, so that no signal is taken by one that does not know what to do with it.
    let signals = Signals::block().map_err(|error| failed("cannot wait for signals", &error))?;
    let sandbox = Sandbox::make(&args.command).map_err(|error| no_sandbox(&error, &args))?;
    let target =
        Target::process(sandbox.pid()).map_err(|error| failed("cannot enter the sandbox", &error))?;
    let attach_method = NonZeroU32::new(sandbox.pid()).and_then(|pid| register::process(pid).ok());
    let refused = |error: &ForwardError| failed("cannot forward from the sandbox", error);
    let native = NativeSockets::prepare(&args, &sandbox, talk)?;
    let is_native = native.is_some();
    let mut session = Forwarding::open(target, attach_method, name, &args.common, is_native, talk, refused)?;
    let pasta = outbound(args.net, &sandbox, talk)?;
    // Until here no call waits for an answer: the command has not started.
    let keeper = native.map(|native| native.start(&args, &sandbox, &session, talk)).transpose()?;

    let namespace =
        Namespace::of(sandbox.pid()).map_err(|error| failed("cannot look into the sandbox", &error))?;
    let command = pidfd(sandbox.pid()).map_err(|error| failed("cannot watch the command", &error))?;
    let mut pidfds = BTreeMap::new();
    pidfds.insert(Watched::Command, again(&command)?);
    if let Some(pasta) = &pasta {
        pidfds.insert(
            Watched::Pasta,
            pidfd(pasta.pid()).map_err(|error| failed("cannot watch pasta", &error))?,
        );
    }
    session.watch(signals, pidfds).map_err(|error| failed("cannot wait for the command", &error))?;
    let mut child = sandbox.start().map_err(|error| no_sandbox(&error, &args))?;
    leave_streams_to_the_command();

    let status = supervise(&mut session, &mut child, &command, talk)?;
    end_what_is_left(&namespace, session, talk);
    drop(keeper);
    drop(pasta);
    Ok(exit_of(status))
}

/// Passes on signals and forwards until the command has ended.
fn supervise(
    session: &mut Forwarding,
    child: &mut Child,
    command: &OwnedFd,
    talk: Talk,
) -> Result<ExitStatus, Failure> {
    let mut forwarding = true;
    loop {
        let wakeup = if forwarding { session.next(None) } else { session.next_without_engine() };
        match wakeup {
            Wakeup::Ended(Watched::Command) => {
                return child.wait().map_err(|error| failed("cannot learn how the command ended", &error));
            }
            Wakeup::Ended(_) => talk.report(&Report::Warning {
                text: "pasta has ended; the command has no outbound network any more".to_owned(),
                hint: None,
            }),
            Wakeup::Signal(signal, origin) if is_for_us_alone(signal, origin) => {
                let signal = rustix::process::Signal::from_named_raw(signal as i32);
                // It may have ended this very moment, and then nobody is left to tell.
                let _ = signal.map(|signal| rustix::process::pidfd_send_signal(command, signal));
            }
            Wakeup::Signal(..) | Wakeup::Tick => {}
            Wakeup::Lost(reason) if forwarding => {
                forwarding = false;
                talk.report(&Report::Warning {
                    text: format!("{reason}; the command goes on, but nothing is forwarded any more"),
                    hint: None,
                });
            }
            Wakeup::Lost(_) => {}
        }
    }
}

/// The sandbox ends with its command: whoever is left in it is told of and asked to end, while connections get their
/// last bytes, and is killed at last.
fn end_what_is_left(namespace: &Namespace, session: Forwarding, talk: Talk) {
    let mut remains = namespace.remains();
    for process in remains.facts() {
        let text = format!("the command left {} (pid {}) behind; it is ended", process.name, process.pid);
        talk.report(&Report::Note { text, hint: None });
    }
    remains.ask_to_end();
    let deadline = Instant::now() + END_MAX;
    session.close(PATIENCE);
    if !remains.wait(deadline) {
        namespace.clear();
    }
}

/// What a process sent, it sent to us; what the kernel sent for a key on the terminal, the command has as well. But
/// a terminal that hangs up tells its session leader alone, so SIGHUP is always passed on.
fn is_for_us_alone(signal: nix::sys::signal::Signal, origin: Origin) -> bool {
    origin == Origin::Process || signal == nix::sys::signal::Signal::SIGHUP
}

/// Starts pasta, as far as it is wanted and there.
fn outbound(net: Net, sandbox: &Sandbox, talk: Talk) -> Result<Option<Pasta>, Failure> {
    if net == Net::None {
        return Ok(None);
    }
    let error = match Pasta::attach(sandbox.pid()) {
        Ok(pasta) => return Ok(Some(pasta)),
        Err(error) => error,
    };
    let hint = match error {
        PastaError::Missing => "install passt, which brings pasta, or say --net none",
        _ if !pasta::tun_is_usable() => {
            "pasta needs /dev/net/tun: chmod 666 /dev/net/tun, as distributions have it"
        }
        _ => "say --net none to do without",
    };
    if net == Net::Pasta {
        return Err(Failure::new(Exit::Failed, chain(&error)).hint(hint));
    }
    let text = format!("the command has no outbound network: {}", chain(&error));
    talk.report(&Report::Note { text, hint: Some(hint.to_owned()) });
    Ok(None)
}

/// Standard input and output belong to the command from now on: if it closes them, whoever is at the other end of
/// a pipe is to notice, which it would not while we hold them too.
fn leave_streams_to_the_command() {
    if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    let byte = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Command(byte(code)),
        (None, Some(signal)) => Exit::Signal(byte(signal)),
        (None, None) => Exit::Failed,
    }
}

/// The last component of the current directory.
fn name_of_directory() -> String {
    let directory = std::env::current_dir().unwrap_or_default();
    let last = directory.file_name().unwrap_or_else(|| OsStr::new("run"));
    name::sanitise(&last.to_string_lossy())
}

fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

fn again(descriptor: &OwnedFd) -> Result<OwnedFd, Failure> {
    descriptor.try_clone().map_err(|error| failed("cannot watch the command", &error))
}

fn failed(what: &str, error: &dyn std::error::Error) -> Failure {
    Failure::new(Exit::Failed, format!("{what}: {}", chain(error)))
}

fn no_sandbox(error: &SandboxError, args: &RunArgs) -> Failure {
    let program = args.command.first().map(|program| program.to_string_lossy()).unwrap_or_default();
    match error {
        SandboxError::Step { step: Step::Exec, errno } if *errno == Errno::NOENT.raw_os_error() => {
            Failure::new(Exit::NotFound, format!("{program}: no such command"))
                .hint("give its path, or see whether it is on the PATH")
        }
        SandboxError::Step { step: Step::Exec, errno } => {
            let why = chain(&io::Error::from_raw_os_error(*errno));
            Failure::new(Exit::NotExecutable, format!("{program}: cannot be executed: {why}"))
                .hint("a command is a program, or a script whose first line names its interpreter")
        }
        SandboxError::Step { step: Step::Unshare, .. } | SandboxError::Map(..) => {
            Failure::new(Exit::Failed, chain(error)).hint(super::doctor::user_namespace_hint())
        }
        _ => Failure::new(Exit::Failed, chain(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_is_the_commands_and_a_signal_is_told_as_shells_do() {
        assert_eq!(exit_of(ExitStatus::from_raw(7 << 8)).code(), 7);
        assert_eq!(exit_of(ExitStatus::from_raw(15)).code(), 143);
    }

    #[test]
    fn a_key_on_the_terminal_is_not_passed_on_twice() {
        use nix::sys::signal::Signal;
        assert!(!is_for_us_alone(Signal::SIGINT, Origin::Kernel));
        assert!(is_for_us_alone(Signal::SIGINT, Origin::Process));
        assert!(is_for_us_alone(Signal::SIGHUP, Origin::Kernel));
    }
}
