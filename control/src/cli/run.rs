//! `landfall run`: runs a command in its own network namespace and forwards its ports to the host's localhost.

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
use crate::cli::ui::output::{Printer, Report};
use crate::error::chain;
use crate::model::name;
use crate::sys::event_loop::{Origin, Signals, Watched};
use crate::sys::sandbox::pasta::{self, Pasta, PastaError};
use crate::sys::sandbox::remains::Namespace;
use crate::sys::sandbox::{Sandbox, SandboxError, Step};

/// The time for connections to finish after the command has ended: its last data may still be in transit.
const DRAIN_MAX: Duration = Duration::from_secs(3);

/// The time for processes that the command left behind to end after SIGTERM.
const END_MAX: Duration = Duration::from_secs(3);

/// Runs the command. Returns the command's exit code.
pub fn run(args: RunArgs) -> Result<Exit, Failure> {
    let printer = Printer::to_stderr(args.common.json);
    let name = args.common.name.clone().unwrap_or_else(name_of_directory);
    // Signals are blocked before the first thread starts, so that no other thread receives one.
    let signals = Signals::block().map_err(|error| failed("cannot wait for signals", &error))?;
    let sandbox = Sandbox::make(&args.command).map_err(|error| sandbox_failure(&error, &args))?;
    let target =
        Target::process(sandbox.pid()).map_err(|error| failed("cannot enter the sandbox", &error))?;
    let attach_method = NonZeroU32::new(sandbox.pid()).and_then(|pid| register::process(pid).ok());
    let refused = |error: &ForwardError| failed("cannot forward from the sandbox", error);
    let native = NativeSockets::prepare(&args, &sandbox, printer)?;
    let is_native = native.is_some();
    let mut session =
        Forwarding::open(target, attach_method, name, &args.common, is_native, printer, refused)?;
    let pasta = outbound(args.net, &sandbox, printer)?;
    // No system call waits for an answer before this point: the command has not started.
    let keeper = native.map(|native| native.start(&args, &sandbox, &session, printer)).transpose()?;

    let namespace =
        Namespace::of(sandbox.pid()).map_err(|error| failed("cannot look into the sandbox", &error))?;
    let command = pidfd(sandbox.pid()).map_err(|error| failed("cannot watch the command", &error))?;
    let mut pidfds = BTreeMap::new();
    pidfds.insert(Watched::Command, clone_pidfd(&command)?);
    if let Some(pasta) = &pasta {
        pidfds.insert(
            Watched::Pasta,
            pidfd(pasta.pid()).map_err(|error| failed("cannot watch pasta", &error))?,
        );
    }
    session.watch(signals, pidfds).map_err(|error| failed("cannot wait for the command", &error))?;
    let mut child = sandbox.start().map_err(|error| sandbox_failure(&error, &args))?;
    release_standard_streams();

    let status = supervise(&mut session, &mut child, &command, printer)?;
    end_remaining_processes(&namespace, session, printer);
    drop(keeper);
    drop(pasta);
    Ok(exit_of(status))
}

/// Passes on signals and forwards until the command has ended.
fn supervise(
    session: &mut Forwarding,
    child: &mut Child,
    command: &OwnedFd,
    printer: Printer,
) -> Result<ExitStatus, Failure> {
    let mut forwarding = true;
    loop {
        let wakeup = if forwarding { session.next(None) } else { session.next_without_engine() };
        match wakeup {
            Wakeup::Ended(Watched::Command) => {
                return child.wait().map_err(|error| failed("cannot learn how the command ended", &error));
            }
            Wakeup::Ended(_) => printer.report(&Report::Warning {
                text: "pasta has ended; the command has lost its outbound network".to_owned(),
                hint: None,
            }),
            Wakeup::Signal(signal, origin) if must_be_passed_on(signal, origin) => {
                let signal = rustix::process::Signal::from_named_raw(signal as i32);
                // An error is ignored: the command may have ended in the meantime.
                let _ = signal.map(|signal| rustix::process::pidfd_send_signal(command, signal));
            }
            Wakeup::Signal(..) | Wakeup::Tick => {}
            Wakeup::Lost(reason) if forwarding => {
                forwarding = false;
                printer.report(&Report::Warning {
                    text: format!("{reason}; the command continues, but its ports are no longer forwarded"),
                    hint: None,
                });
            }
            Wakeup::Lost(_) => {}
        }
    }
}

/// Ends the processes that the command left in the sandbox. Each is reported and gets SIGTERM, while open connections
/// transfer their last bytes; after [`END_MAX`] the rest are killed.
fn end_remaining_processes(namespace: &Namespace, session: Forwarding, printer: Printer) {
    let mut remains = namespace.remains();
    for process in remains.facts() {
        let text =
            format!("the command left {} (pid {}) behind; landfall ends it", process.name, process.pid);
        printer.report(&Report::Note { text, hint: None });
    }
    remains.ask_to_end();
    let deadline = Instant::now() + END_MAX;
    session.close(DRAIN_MAX);
    if !remains.wait(deadline) {
        namespace.clear();
    }
}

/// Returns whether the command has not received the signal itself. A process sends a signal to this process only; for a
/// key on the terminal the kernel signals the command's process group, too. A hangup of the terminal is signalled to
/// the session leader only, so SIGHUP is always passed on.
fn must_be_passed_on(signal: nix::sys::signal::Signal, origin: Origin) -> bool {
    origin == Origin::Process || signal == nix::sys::signal::Signal::SIGHUP
}

/// Starts pasta, if it is requested and installed.
fn outbound(net: Net, sandbox: &Sandbox, printer: Printer) -> Result<Option<Pasta>, Failure> {
    if net == Net::None {
        return Ok(None);
    }
    let error = match Pasta::attach(sandbox.pid()) {
        Ok(pasta) => return Ok(Some(pasta)),
        Err(error) => error,
    };
    let hint = match error {
        PastaError::Missing => "install passt, which contains pasta, or use --net none",
        _ if !pasta::tun_is_usable() => {
            "pasta needs /dev/net/tun: chmod 666 /dev/net/tun, the default of distributions"
        }
        _ => "use --net none to run without an outbound network",
    };
    if net == Net::Pasta {
        return Err(Failure::new(Exit::Failed, chain(&error)).hint(hint));
    }
    let text = format!("the command has no outbound network: {}", chain(&error));
    printer.report(&Report::Note { text, hint: Some(hint.to_owned()) });
    Ok(None)
}

/// Replaces this process's standard input and output by /dev/null. Otherwise the peer of a pipe would not see its end
/// when the command closes it.
fn release_standard_streams() {
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

/// Returns the last component of the current directory, as a name.
fn name_of_directory() -> String {
    let directory = std::env::current_dir().unwrap_or_default();
    let last = directory.file_name().unwrap_or_else(|| OsStr::new("run"));
    name::sanitise(&last.to_string_lossy())
}

fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

fn clone_pidfd(descriptor: &OwnedFd) -> Result<OwnedFd, Failure> {
    descriptor.try_clone().map_err(|error| failed("cannot watch the command", &error))
}

fn failed(what: &str, error: &dyn std::error::Error) -> Failure {
    Failure::new(Exit::Failed, format!("{what}: {}", chain(error)))
}

fn sandbox_failure(error: &SandboxError, args: &RunArgs) -> Failure {
    let program = args.command.first().map(|program| program.to_string_lossy()).unwrap_or_default();
    match error {
        SandboxError::Step { step: Step::Exec, errno } if *errno == Errno::NOENT.raw_os_error() => {
            Failure::new(Exit::NotFound, format!("{program}: no such command"))
                .hint("give its path, or check the PATH")
        }
        SandboxError::Step { step: Step::Exec, errno } => {
            let why = chain(&io::Error::from_raw_os_error(*errno));
            Failure::new(Exit::NotExecutable, format!("{program}: cannot be executed: {why}"))
                .hint("a command must be a program, or a script whose first line names its interpreter")
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
    fn the_exit_code_is_the_commands_or_128_plus_its_signal() {
        assert_eq!(exit_of(ExitStatus::from_raw(7 << 8)).code(), 7);
        assert_eq!(exit_of(ExitStatus::from_raw(15)).code(), 143);
    }

    #[test]
    fn a_terminal_signal_is_not_passed_on_again() {
        use nix::sys::signal::Signal;
        assert!(!must_be_passed_on(Signal::SIGINT, Origin::Kernel));
        assert!(must_be_passed_on(Signal::SIGINT, Origin::Process));
        assert!(must_be_passed_on(Signal::SIGHUP, Origin::Kernel));
    }
}
