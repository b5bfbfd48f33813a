//! What Docker tells of a container, in our words. Pure.

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

/// Podman's images of the containers that hold the network of a pod, without their tag.
const POD_IMAGE: &str = "localhost/podman-pause";

/// What happened to a container, in Docker's words: Podman has some of its own.
pub(super) fn in_dockers_words(what: String) -> String {
    match what.as_str() {
        "died" => "die".to_owned(),
        "remove" => "destroy".to_owned(),
        _ => what,
    }
}

/// One of Docker's list. None where what makes it a container is missing, and for what holds the network of a pod.
/// `images` has the labels of its image, where those matter.
pub(super) fn listed(told: ContainerSummary, images: &HashMap<String, ImageLabels>) -> Option<Listed> {
    use ContainerSummaryStateEnum::{PAUSED, RUNNING};
    if told
        .image
        .as_ref()
        .and_then(|image| image.strip_prefix(POD_IMAGE))
        .is_some_and(|tag| tag.starts_with(':'))
    {
        return None;
    }
    // A link is one more name, below that of another container.
    let mut names = told
        .names
        .into_iter()
        .flatten()
        .filter_map(|name| ContainerName::new(name.strip_prefix('/').unwrap_or(&name)).ok());
    let name = names.next()?;
    let mode = told.host_config.and_then(|config| config.network_mode);
    let ports = told.ports.unwrap_or_default().into_iter().filter_map(|port| {
        let is_ours = port.typ == Some(PortSummaryTypeEnum::TCP) && answers_locally(port.ip.as_deref());
        let (inside, outside) = (NonZeroU16::new(port.private_port)?, NonZeroU16::new(port.public_port?)?);
        is_ours.then_some((inside, outside))
    });
    let image_labels = told.image_id.and_then(|id| images.get(&id).cloned());
    let image_labels = image_labels.unwrap_or(ImageLabels::Unknown);
    Some(Listed {
        id: told.id?,
        name,
        is_between_names: names.next().is_some(),
        image: told.image.unwrap_or_default(),
        running: matches!(told.state, Some(RUNNING | PAUSED)),
        labels: ContainerLabels::new(told.labels.unwrap_or_default().into_iter().collect(), image_labels),
        network: network(mode.as_deref()),
        created: told.created.unwrap_or_default(),
        published: ports.collect(),
    })
}

/// What happens to containers and changes where they are or whether they run. The rest is more and says nothing: every check
/// of a container's health is three events.
const LIFE: [&str; 9] =
    ["create", "start", "restart", "die", "stop", "pause", "unpause", "rename", "destroy"];

/// What one of Docker's events says about containers.
pub(super) fn life_events(told: EventMessage) -> Vec<LifeEvent> {
    let (Some(what), Some(actor)) = (told.action, told.actor) else { return Vec::new() };
    let mut attributes = actor.attributes.unwrap_or_default();
    let changed = |id: &str, name: String| LifeEvent::Changed { id: id.to_owned(), name, what: what.clone() };
    match told.typ {
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

/// The network of a container of this mode.
pub(super) fn network(mode: Option<&str>) -> Network {
    match mode {
        Some("host") => Network::Host,
        Some(mode) => {
            mode.strip_prefix("container:").map_or(Network::Own, |other| Network::Shared(other.to_owned()))
        }
        None => Network::Own,
    }
}

/// Where the host is on a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Gateway {
    Address(IpAddr),
    /// At the address of this interface of the engine's machine.
    Interface(String),
}

/// The option of a network that tells its interface.
const BRIDGE_NAME: &str = "com.docker.network.bridge.name";

/// Where the host is on a network of this kind. An engine that has just made its bridge tells the interface alone, until it
/// is started again.
pub(super) fn gateway(network: NetworkInspect) -> Option<Gateway> {
    let pools = network.ipam.and_then(|ipam| ipam.config).into_iter().flatten();
    let address = pools.filter_map(|pool| pool.gateway?.parse().ok()).next();
    let interface = || network.options?.remove(BRIDGE_NAME);
    address.map(Gateway::Address).or_else(|| interface().map(Gateway::Interface))
}

/// What is published where `localhost` answers: TCP ports inside, and those of the host.
pub(super) fn published(ports: &PortMap) -> BTreeMap<NonZeroU16, NonZeroU16> {
    let published = ports.iter().filter_map(|(inside, bindings)| {
        let inside = inside.strip_suffix("/tcp")?.parse().ok()?;
        let bindings = bindings.iter().flatten();
        let local = bindings.filter(|binding| answers_locally(binding.host_ip.as_deref()));
        Some((inside, host_port(local)?))
    });
    published.collect()
}

/// Whether what is bound to this address of the host answers at `localhost`. Docker says nothing for all addresses.
fn answers_locally(address: Option<&str>) -> bool {
    match address {
        None | Some("") => true,
        Some(text) => text.parse().is_ok_and(|ip: IpAddr| ip.is_loopback() || ip.is_unspecified()),
    }
}

/// The host port of the first usable binding, IPv4 before IPv6 (wire specification, A.6.1).
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

/// The directory of the host that is mounted where an agent puts its socket.
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
    fn a_container_of_the_list_is_read() {
        let told: ContainerSummary = serde_json::from_value(serde_json::json!({
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
        let listed = listed(told, &images).unwrap();
        assert_eq!((listed.id.as_str(), listed.name.as_str()), ("abc", "shop"));
        assert!(!listed.is_between_names);
        assert!(listed.running);
        assert_eq!(listed.network, Network::Shared("def".to_owned()));
        assert_eq!(listed.published, BTreeMap::from([(port(80), port(8080))]));
        assert_eq!(listed.labels.own("dev.landfall.forward"), Some("true"));
        assert_eq!(listed.labels.own("dev.landfall.name"), None);
    }

    #[test]
    fn one_with_two_names_of_its_own_is_between_them() {
        let told = serde_json::json!({"Id": "abc", "Names": ["/shop", "/other/alias", "/store"]});
        assert!(listed(serde_json::from_value(told).unwrap(), &HashMap::new()).unwrap().is_between_names);
    }

    #[test]
    fn what_podman_tells_is_read_like_dockers() {
        // Its list tells no network mode, and an empty one is no other container's.
        let told = |image: &str| -> ContainerSummary {
            serde_json::from_value(serde_json::json!({
                "Id": "abc", "Names": ["/8abeaf822805-infra"], "Image": image, "State": "running", "HostConfig": null,
                "Ports": [], "Labels": {}
            }))
            .unwrap()
        };
        assert!(listed(told("localhost/podman-pause:4.3.1-0"), &HashMap::new()).is_none());
        assert_eq!(listed(told("localhost/podman-pauser:1"), &HashMap::new()).unwrap().network, Network::Own);
        for (mode, own) in [("slirp4netns", true), ("pasta", true), ("bridge", true), ("container:x", false)]
        {
            assert_eq!(network(Some(mode)) == Network::Own, own, "{mode}");
        }
        let words = ["died", "remove", "start"].map(|word| in_dockers_words(word.to_owned()));
        assert_eq!(words, ["die", "destroy", "start"]);
    }

    #[test]
    fn the_host_is_at_the_gateway_or_at_the_interface() {
        let at = |told: serde_json::Value| gateway(serde_json::from_value(told).unwrap());
        let options = serde_json::json!({(BRIDGE_NAME): "docker0"});
        let both = serde_json::json!({"IPAM": {"Config": [{"Subnet": "172.17.0.0/16", "Gateway": "172.17.0.1"}]},
            "Options": options});
        assert_eq!(at(both), Some(Gateway::Address([172, 17, 0, 1].into())));
        let new = serde_json::json!({"IPAM": {"Config": [{"Subnet": "172.17.0.0/16"}]}, "Options": options});
        assert_eq!(at(new), Some(Gateway::Interface("docker0".to_owned())));
        assert_eq!(at(serde_json::json!({"IPAM": {"Config": []}})), None);
    }

    #[test]
    fn only_a_writable_mount_at_the_agents_place_is_its_directory() {
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
    fn what_is_bound_elsewhere_is_not_published_on_localhost() {
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
    fn a_published_port_is_that_of_the_first_usable_binding_and_of_ipv4_if_there_is_one() {
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
