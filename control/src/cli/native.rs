//! Native sockets of `landfall run`: the choice between native sockets and the relay, and the start of the supervisor.

use std::num::NonZeroU16;

use landfall_engine::native::Supervisor;

use super::args::{Net, Ring, RunArgs};
use super::exit::{Exit, Failure};
use super::forwarding::Forwarding;
use crate::cli::daemon_client;
use crate::cli::foreground::native_driver::RunDriver;
use crate::cli::ui::output::{Printer, Report};
use crate::daemon::rpc::client::{Client, PROBE_BUDGET};
use crate::error::chain;
use crate::model::native_sockets::{Sockets, VARIABLE};
use crate::model::port_policy::ControlPorts;
use crate::sys::paths::Home;
use crate::sys::sandbox::keeper::Keeper;
use crate::sys::sandbox::{Filtered, Sandbox};

/// The state between the installation of the native-socket filter and the start of the command.
pub(super) struct NativeSockets {
    filtered: Filtered,
    supervisor: Supervisor,
    control_ports: ControlPorts,
}

impl NativeSockets {
    /// Installs the filter if native sockets are chosen and the kernel supports them. Returns `None` if servers are
    /// relayed.
    ///
    /// # Errors
    /// The options contradict each other, or `--sockets native` is given and the kernel refuses.
    pub(super) fn prepare(
        args: &RunArgs,
        sandbox: &Sandbox,
        printer: Printer,
    ) -> Result<Option<NativeSockets>, Failure> {
        let daemon = daemon_of(args);
        let chosen =
            chosen(args, std::env::var(VARIABLE).ok(), daemon.as_ref().map(|daemon| daemon.sockets))?;
        if chosen == Sockets::Relay {
            return Ok(None);
        }
        let refused = |error: &dyn std::error::Error| {
            Failure::new(Exit::Failed, format!("native sockets do not work here: {}", chain(error)))
                .hint("--sockets relay works without them; landfall doctor shows details")
        };
        let supervisor = match Supervisor::prepare() {
            Ok(supervisor) => supervisor,
            Err(error) if chosen == Sockets::Native => return Err(refused(&error)),
            Err(error) => return Ok(fall_back(printer, &error)),
        };
        match sandbox.filter().map_err(|error| refused(&error))? {
            Ok(filtered) => {
                let port = daemon.and_then(|daemon| daemon.http_port).and_then(NonZeroU16::new);
                let control_ports = ControlPorts::new(port);
                Ok(Some(NativeSockets { filtered, supervisor, control_ports }))
            }
            Err(error) if chosen == Sockets::Native => Err(refused(&error)),
            Err(error) => Ok(fall_back(printer, &error)),
        }
    }

    /// Starts to answer the command's system calls, and starts the process that ends the sandbox when this one dies.
    ///
    /// # Errors
    /// The supervisor or the keeper did not start.
    pub(super) fn start(
        self,
        args: &RunArgs,
        sandbox: &Sandbox,
        session: &Forwarding,
        printer: Printer,
    ) -> Result<Keeper, Failure> {
        let failed = |error: &dyn std::error::Error| {
            Failure::new(Exit::Failed, format!("native sockets cannot be used: {}", chain(error)))
                .hint("--sockets relay works without them")
        };
        let keeper = Keeper::start(sandbox.pid()).map_err(|error| failed(&error))?;
        let sink = session.native_events().map_err(|error| failed(&error))?;
        let driver =
            RunDriver::new(args.common.policy(), self.control_ports, args.on_conflict, printer, sink);
        let Filtered { notifications, netns_cookie } = self.filtered;
        self.supervisor.start(notifications, netns_cookie, driver).map_err(|error| failed(&error))?;
        Ok(keeper)
    }
}

/// Prints that servers are relayed, with the reason.
fn fall_back(printer: Printer, error: &dyn std::error::Error) -> Option<NativeSockets> {
    let text = format!("servers are relayed, since native sockets do not work here: {}", chain(error));
    printer.report(&Report::Note { text, hint: Some("--sockets relay suppresses this note".to_owned()) });
    None
}

/// Returns the choice of the command line, the environment or the daemon, in this order.
fn chosen(args: &RunArgs, variable: Option<String>, daemon: Option<Sockets>) -> Result<Sockets, Failure> {
    if args.net == Net::None {
        // A native socket is a path out of the network namespace, which `--net none` must not have.
        return match args.sockets {
            Some(Sockets::Native) => Err(Failure::new(
                Exit::Usage,
                "--net none isolates the command's network, and --sockets native needs the host's network",
            )
            .hint("omit one of the two")),
            _ => Ok(Sockets::Relay),
        };
    }
    let variable = match variable.as_deref().map(str::trim) {
        None | Some("") => None,
        Some(word) => {
            let known = [Sockets::Auto, Sockets::Native, Sockets::Relay].into_iter();
            let sockets = known.into_iter().find(|sockets| sockets.as_str() == word);
            Some(sockets.ok_or_else(|| {
                Failure::new(Exit::Usage, format!("{VARIABLE} is \"{word}\", which is invalid"))
                    .hint("set it to auto, native or relay")
            })?)
        }
    };
    Ok(args.sockets.or(variable).or(daemon).unwrap_or_default())
}

/// Returns the description of the daemon that will forward, if one does.
fn daemon_of(args: &RunArgs) -> Option<daemon_client::Description> {
    if args.common.no_daemon || args.common.ring != Ring::Auto {
        return None;
    }
    let home = Home::from_environment().ok().filter(|home| home.socket().exists())?;
    daemon_client::describe(&Client::new(home.socket()).within(PROBE_BUDGET)).ok().flatten()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::args::{Cli, Verb};

    fn choice(
        arguments: &[&str],
        variable: Option<&str>,
        daemon: Option<Sockets>,
    ) -> Result<Sockets, String> {
        let words = ["landfall", "run"].iter().chain(arguments).chain(&["--", "true"]);
        let Verb::Run(args) = Cli::try_parse_from(words).unwrap().verb else { panic!("not run") };
        chosen(&args, variable.map(str::to_owned), daemon).map_err(|failure| failure.message)
    }

    #[test]
    fn the_command_line_overrides_the_environment_which_overrides_the_daemon() {
        assert_eq!(choice(&[], None, None), Ok(Sockets::Auto));
        assert_eq!(choice(&[], None, Some(Sockets::Relay)), Ok(Sockets::Relay));
        assert_eq!(choice(&[], Some("native"), Some(Sockets::Relay)), Ok(Sockets::Native));
        assert_eq!(choice(&["--sockets", "relay"], Some("native"), None), Ok(Sockets::Relay));
        assert_eq!(choice(&[], Some(" "), None), Ok(Sockets::Auto));
        assert!(choice(&[], Some("fast"), None).unwrap_err().contains("LANDFALL_SOCKETS is \"fast\""));
    }

    #[test]
    fn net_none_excludes_native_sockets() {
        assert_eq!(choice(&["--net", "none"], None, None), Ok(Sockets::Relay));
        assert_eq!(choice(&["--net", "none"], Some("native"), None), Ok(Sockets::Relay));
        assert!(choice(&["--net", "none", "--sockets", "native"], None, None).is_err());
        assert_eq!(choice(&["--net", "pasta"], None, None), Ok(Sockets::Auto));
    }
}
