//! Converts the engine's answers about containers to the crate's types. Pure.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::PathBuf;

use bollard::models::{
    ContainerSummary, ContainerSummaryStateEnum, EventMessage, EventMessageTypeEnum, MountPoint,
    NetworkInspect, PortBinding, PortMap, PortSummaryTypeEnum,
};

use crate::docker::labels::{ContainerLabels, ImageLabels};
use crate::docker::{AGENT_DIRECTORY, LifeEvent, Listed, Network};
use crate::model::registration::ContainerName;

/// Podman's image of the containers that hold the network of a pod, without the tag.
const POD_IMAGE: &str = "localhost/podman-pause";

/// Converts an action of an event to Docker's name for it. Podman has other names for some.
pub(super) fn docker_action(what: String) -> String {
    match what.as_str() {
        "died" => "die".to_owned(),
        "remove" => "destroy".to_owned(),
        _ => what,
    }
}

/// Converts one container of the list. Returns `None` if required fields are missing, and for a container that holds the
/// network of a pod. `images` has the labels of its image, if they are needed.
pub(super) fn listed(answer: ContainerSummary, images: &HashMap<String, ImageLabels>) -> Option<Listed> {
    use ContainerSummaryStateEnum::{PAUSED, RUNNING};
    if answer
        .image
        .as_ref()
        .and_then(|image| image.strip_prefix(POD_IMAGE))
        .is_some_and(|tag| tag.starts_with(':'))
    {
        return None;
    }
    // A link is an additional name, below the name of another container.
    let mut names = answer
        .names
        .into_iter()
        .flatten()
        .filter_map(|name| ContainerName::new(name.strip_prefix('/').unwrap_or(&name)).ok());
    let name = names.next()?;
    let mode = answer.host_config.and_then(|config| config.network_mode);
    let ports = answer.ports.unwrap_or_default().into_iter().filter_map(|port| {
        let is_ours = port.typ == Some(PortSummaryTypeEnum::TCP) && answers_locally(port.ip.as_deref());
        let (inside, outside) = (NonZeroU16::new(port.private_port)?, NonZeroU16::new(port.public_port?)?);
        is_ours.then_some((inside, outside))
    });
    let image_labels = answer.image_id.and_then(|id| images.get(&id).cloned());
    let image_labels = image_labels.unwrap_or(ImageLabels::Unknown);
    Some(Listed {
        id: answer.id?,
        name,
        is_between_names: names.next().is_some(),
        image: answer.image.unwrap_or_default(),
        running: matches!(answer.state, Some(RUNNING | PAUSED)),
        labels: ContainerLabels::new(answer.labels.unwrap_or_default().into_iter().collect(), image_labels),
        network: network(mode.as_deref()),
        created: answer.created.unwrap_or_default(),
        published: ports.collect(),
    })
}

/// The actions that affect whether a container exists, runs, or has its name. All others are ignored; they are frequent:
/// each health check causes three events.
const LIFE: [&str; 9] =
    ["create", "start", "restart", "die", "stop", "pause", "unpause", "rename", "destroy"];

/// Converts an event of the engine to events of containers.
pub(super) fn life_events(answer: EventMessage) -> Vec<LifeEvent> {
    let (Some(what), Some(actor)) = (answer.action, answer.actor) else { return Vec::new() };
    let mut attributes = actor.attributes.unwrap_or_default();
    let changed = |id: &str, name: String| LifeEvent::Changed { id: id.to_owned(), name, what: what.clone() };
    match answer.typ {
        Some(EventMessageTypeEnum::NETWORK) if matches!(what.as_str(), "connect" | "disconnect") => {
            attributes.remove("container").map(|id| changed(&id, String::new())).into_iter().collect()
        }
        Some(EventMessageTypeEnum::CONTAINER) if LIFE.contains(&what.as_str()) => {
            let Some(id) = actor.id else { return Vec::new() };
            let old = attributes.remove("oldName");
            let old = old.map(|old| old.strip_prefix('/').unwrap_or(&old).to_owned());
            attributes.remove("name").into_iter().chain(old).map(|name| changed(&id, name)).collect()
        }
        _ => Vec::new(),
    }
}

/// Returns the network of a container with this mode.
pub(super) fn network(mode: Option<&str>) -> Network {
    match mode {
        Some("host") => Network::Host,
        Some(mode) => {
            mode.strip_prefix("container:").map_or(Network::Own, |other| Network::Shared(other.to_owned()))
        }
        None => Network::Own,
    }
}

/// The host's address on a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Gateway {
    Address(IpAddr),
    /// The address of this interface of the engine's machine.
    Interface(String),
}

/// The option of a network that names its interface.
const BRIDGE_NAME: &str = "com.docker.network.bridge.name";

/// Returns the host's address on a network. An engine that has just created its bridge reports only the interface, until its
/// next start.
pub(super) fn gateway(network: NetworkInspect) -> Option<Gateway> {
    let pools = network.ipam.and_then(|ipam| ipam.config).into_iter().flatten();
    let address = pools.filter_map(|pool| pool.gateway?.parse().ok()).next();
    let interface = || network.options?.remove(BRIDGE_NAME);
    address.map(Gateway::Address).or_else(|| interface().map(Gateway::Interface))
}

/// Returns the TCP ports that are published at `localhost`: ports inside, and their host ports.
pub(super) fn published(ports: &PortMap) -> BTreeMap<NonZeroU16, NonZeroU16> {
    let published = ports.iter().filter_map(|(inside, bindings)| {
        let inside = inside.strip_suffix("/tcp")?.parse().ok()?;
        let bindings = bindings.iter().flatten();
        let local = bindings.filter(|binding| answers_locally(binding.host_ip.as_deref()));
        Some((inside, host_port(local)?))
    });
    published.collect()
}

/// Returns whether a listener on this host address answers at `localhost`. An absent or empty address means all addresses.
fn answers_locally(address: Option<&str>) -> bool {
    match address {
        None | Some("") => true,
        Some(text) => text.parse().is_ok_and(|ip: IpAddr| ip.is_loopback() || ip.is_unspecified()),
    }
}

/// Returns the host port of the first usable binding, IPv4 before IPv6 (wire specification, A.6.1).
pub(super) fn host_port<'a>(bindings: impl Iterator<Item = &'a PortBinding>) -> Option<NonZeroU16> {
    let mut usable = bindings.filter_map(|binding| {
        let address = binding.host_ip.as_deref().unwrap_or_default();
        let port = binding.host_port.as_deref()?.trim().parse().ok()?;
        Some((address.contains(':'), port))
    });
    let first = usable.next()?;
    let chosen = if first.0 { usable.find(|(is_v6, _)| !is_v6).unwrap_or(first) } else { first };
    Some(chosen.1)
}

/// Returns the host directory that is mounted where an agent creates its socket.
pub(super) fn agent_directory(mounts: Vec<MountPoint>) -> Option<PathBuf> {
    let mount = mounts
        .into_iter()
        .find(|mount| mount.destination.as_deref() == Some(AGENT_DIRECTORY) && mount.rw == Some(true))?;
    mount.source.map(PathBuf::from).filter(|source| source.is_absolute())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(number: u16) -> NonZeroU16 {
        NonZeroU16::new(number).unwrap()
    }

    #[test]
    fn a_listed_container_is_converted() {
        let answer: ContainerSummary = serde_json::from_value(serde_json::json!({
            "Id": "abc", "Names": ["/other/alias", "/shop"], "Image": "node:22", "ImageID": "sha256:1", "State": "paused",
            "Labels": {"dev.landfall.forward": "true", "dev.landfall.name": "web"}, "HostConfig": {"NetworkMode": "container:def"},
            "Ports": [
                {"IP": "0.0.0.0", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"},
                {"IP": "::", "PrivatePort": 80, "PublicPort": 8080, "Type": "tcp"},
                {"IP": "192.0.2.1", "PrivatePort": 81, "PublicPort": 8081, "Type": "tcp"},
                {"IP": "127.0.0.1", "PrivatePort": 82, "PublicPort": 8082, "Type": "udp"},
                {"PrivatePort": 83, "Type": "tcp"}
            ]
        }))
        .unwrap();
        let image = [("dev.landfall.name".to_owned(), "web".to_owned())];
        let images = HashMap::from([("sha256:1".to_owned(), ImageLabels::of(image))]);
        let listed = listed(answer, &images).unwrap();
        assert_eq!((listed.id.as_str(), listed.name.as_str()), ("abc", "shop"));
        assert!(!listed.is_between_names);
        assert!(listed.running);
        assert_eq!(listed.network, Network::Shared("def".to_owned()));
        assert_eq!(listed.published, BTreeMap::from([(port(80), port(8080))]));
        assert_eq!(listed.labels.own("dev.landfall.forward"), Some("true"));
        assert_eq!(listed.labels.own("dev.landfall.name"), None);
    }

    #[test]
    fn a_container_with_two_names_is_between_names() {
        let answer = serde_json::json!({"Id": "abc", "Names": ["/shop", "/other/alias", "/store"]});
        assert!(listed(serde_json::from_value(answer).unwrap(), &HashMap::new()).unwrap().is_between_names);
    }

    #[test]
    fn podmans_answers_are_converted_like_dockers() {
        // Its list has no network mode, and an empty mode does not refer to another container.
        let answer = |image: &str| -> ContainerSummary {
            serde_json::from_value(serde_json::json!({
                "Id": "abc", "Names": ["/8abeaf822805-infra"], "Image": image, "State": "running", "HostConfig": null,
                "Ports": [], "Labels": {}
            }))
            .unwrap()
        };
        assert!(listed(answer("localhost/podman-pause:4.3.1-0"), &HashMap::new()).is_none());
        assert_eq!(
            listed(answer("localhost/podman-pauser:1"), &HashMap::new()).unwrap().network,
            Network::Own
        );
        for (mode, own) in [("slirp4netns", true), ("pasta", true), ("bridge", true), ("container:x", false)]
        {
            assert_eq!(network(Some(mode)) == Network::Own, own, "{mode}");
        }
        let words = ["died", "remove", "start"].map(|word| docker_action(word.to_owned()));
        assert_eq!(words, ["die", "destroy", "start"]);
    }

    #[test]
    fn the_gateway_is_an_address_or_an_interface() {
        let at = |answer: serde_json::Value| gateway(serde_json::from_value(answer).unwrap());
        let options = serde_json::json!({(BRIDGE_NAME): "docker0"});
        let both = serde_json::json!({"IPAM": {"Config": [{"Subnet": "172.17.0.0/16", "Gateway": "172.17.0.1"}]},
            "Options": options});
        assert_eq!(at(both), Some(Gateway::Address([172, 17, 0, 1].into())));
        let new = serde_json::json!({"IPAM": {"Config": [{"Subnet": "172.17.0.0/16"}]}, "Options": options});
        assert_eq!(at(new), Some(Gateway::Interface("docker0".to_owned())));
        assert_eq!(at(serde_json::json!({"IPAM": {"Config": []}})), None);
    }

    #[test]
    fn only_a_writable_mount_at_the_agents_directory_is_used() {
        let mount = |destination: &str, rw| MountPoint {
            source: Some("/home/u/shared".to_owned()),
            destination: Some(destination.to_owned()),
            rw: Some(rw),
            ..MountPoint::default()
        };
        assert_eq!(agent_directory(vec![mount("/data", true)]), None);
        assert_eq!(agent_directory(vec![mount(AGENT_DIRECTORY, false)]), None);
        let found = agent_directory(vec![mount("/data", true), mount(AGENT_DIRECTORY, true)]);
        assert_eq!(found, Some(PathBuf::from("/home/u/shared")));
    }

    #[test]
    fn ports_on_other_addresses_are_not_published_on_localhost() {
        let ports: PortMap = serde_json::from_value(serde_json::json!({
            "80/tcp": [{"HostIp": "192.0.2.1", "HostPort": "80"}, {"HostIp": "::1", "HostPort": "8080"}],
            "81/tcp": null, "82/udp": [{"HostIp": "", "HostPort": "82"}], "83/tcp": [{"HostIp": "", "HostPort": "83"}]
        }))
        .unwrap();
        assert_eq!(published(&ports), BTreeMap::from([(port(80), port(8080)), (port(83), port(83))]));
    }

    fn binding(address: &str, port: &str) -> PortBinding {
        PortBinding { host_ip: Some(address.to_owned()), host_port: Some(port.to_owned()) }
    }

    #[test]
    fn the_first_usable_binding_is_used_and_ipv4_is_preferred() {
        let port = |bindings: &[(&str, &str)]| {
            let bindings: Vec<_> = bindings.iter().map(|(address, port)| binding(address, port)).collect();
            host_port(bindings.iter()).map(NonZeroU16::get)
        };
        assert_eq!(port(&[("127.0.0.1", "32768")]), Some(32_768));
        assert_eq!(port(&[("::", "32769"), ("0.0.0.0", "32768")]), Some(32_768));
        assert_eq!(port(&[("::1", "32769")]), Some(32_769));
        assert_eq!(port(&[("", " 32768 ")]), Some(32_768));
        for unusable in ["", "0", "65536", "http", "-1"] {
            assert_eq!(port(&[("127.0.0.1", unusable)]), None, "{unusable}");
        }
        assert_eq!(port(&[("127.0.0.1", "none"), ("::1", "32769")]), Some(32_769));
        assert_eq!(port(&[]), None);
    }
}
