//! The holder of a host port that Docker cannot publish, since another process listens there.

use std::net::{IpAddr, Ipv4Addr};

use super::DockerError;
use super::models::{ContainerInspectResponse, PortBinding};
use crate::sys::held_port::HeldPort;

/// Adds the holders of a container's host ports to the error of its start, if the error says that a port is taken.
pub(super) async fn with_holders(
    error: DockerError,
    inspected: Option<&ContainerInspectResponse>,
) -> DockerError {
    match error {
        DockerError::Refused(mut why) if is_taken(&why) => {
            for (address, port) in bindings(inspected) {
                if let Some(held) = HeldPort::look_up(address, port).await {
                    why.push_str(&format!("; {held}"));
                }
            }
            DockerError::Refused(why)
        }
        error => error,
    }
}

/// Returns whether the text of an error reports a host port that is in use. The API has no code for it.
fn is_taken(why: &str) -> bool {
    ["port is already allocated", "address already in use", "ports are not available"]
        .iter()
        .any(|said| why.contains(said))
}

/// Returns the host addresses and ports that a container requests. Skips empty ports and port 0, which Docker chooses.
fn bindings(inspected: Option<&ContainerInspectResponse>) -> Vec<(IpAddr, u16)> {
    let config = inspected.and_then(|inspected| inspected.host_config.as_ref());
    let bindings = config.and_then(|config| config.port_bindings.as_ref());
    let binding = |binding: &PortBinding| {
        let port = binding.host_port.as_deref()?.trim().parse().ok().filter(|port| *port != 0)?;
        // An absent or empty address means all addresses.
        let address = binding.host_ip.as_deref().and_then(|ip| ip.parse().ok());
        Some((address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), port))
    };
    bindings
        .into_iter()
        .flat_map(|bindings| bindings.values())
        .flatten()
        .flatten()
        .filter_map(binding)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requested_ports_are_looked_up() {
        let inspected = serde_json::json!({"HostConfig": {"PortBindings": {
            "80/tcp": [{"HostIp": "", "HostPort": "8080"}, {"HostIp": "127.0.0.1", "HostPort": "8081"}],
            "81/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}, {"HostPort": "0"}], "82/tcp": null
        }}});
        let inspected = serde_json::from_value(inspected).unwrap();
        let wanted = [(Ipv4Addr::UNSPECIFIED.into(), 8080), (Ipv4Addr::LOCALHOST.into(), 8081)];
        assert_eq!(bindings(Some(&inspected)), wanted);
    }

    #[test]
    fn errors_about_a_port_in_use_are_recognised() {
        for words in [
            "driver failed programming external connectivity on endpoint x: Bind for 127.0.0.1:80 failed: port is already allocated",
            "Error starting userland proxy: listen tcp4 127.0.0.1:8973: bind: address already in use",
        ] {
            assert!(is_taken(words), "{words}");
        }
        assert!(!is_taken("no such image"));
    }
}
