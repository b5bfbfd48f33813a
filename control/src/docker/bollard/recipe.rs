//! From what Docker tells of a container to what it takes to make the same one again from another image.
//!
//! What Docker tells is the container's own configuration and its image's in one. Only the container's own is handed on:
//! where the two agree, the new image decides. The user is an exception, which `user` explains. Docker generates the host
//! name, the addresses and the endpoint ids of a container again. Volumes without a name would be lost with the container
//! that they belong to, so they are handed on by the names that Docker gave them.

use std::collections::HashMap;

use super::models::{
    ContainerConfig, ContainerCreateBody, ContainerInspectResponse, EndpointSettings, HostConfig,
    ImageConfig, MountPoint, NetworkingConfig,
};
use super::user::User;
use crate::docker::rebuild::USER_LABEL;

/// How many characters of a container's id Docker makes its host name of.
const SHORT_ID: usize = 12;

/// How to make a container.
#[derive(Debug)]
pub(super) struct Recipe {
    pub(super) body: ContainerCreateBody,
    /// Networks beside the first: older engines take one at a time.
    pub(super) networks: Vec<(String, EndpointSettings)>,
}

/// The recipe of a container, from `image` in place of its old image, whose configuration is `defaults`.
pub(super) fn recipe(
    told: ContainerInspectResponse,
    defaults: &ImageConfig,
    image: &str,
    user: User,
) -> Recipe {
    let id = told.id.unwrap_or_default();
    let short_id = id.get(..SHORT_ID).unwrap_or(&id);
    let mut host = told.host_config.unwrap_or_default();
    keep_volumes(&mut host, &told.mounts.unwrap_or_default());
    // A file that Docker's client wrote once, and refuses to write again.
    host.container_id_file = None;
    let told_networks = told.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    // Podman says "bridge" whatever the network's name is, which would add the one of that name.
    if matches!(host.network_mode.as_deref(), Some("bridge" | "default"))
        && !told_networks.contains_key("bridge")
        && let Some(name) = told_networks.keys().min()
    {
        host.network_mode = Some(name.clone());
    }
    let mode = host.network_mode.clone().unwrap_or_default();
    let (first, networks) = networks(&mode, told_networks, short_id);
    host.group_add = user.groups.or(host.group_add);
    let mut body = own(told.config.unwrap_or_default(), defaults, short_id);
    body.user = user.user;
    body.labels.get_or_insert_default().insert(USER_LABEL.to_owned(), user.asked.unwrap_or_default());
    if mode.starts_with("container:") || host.uts_mode.as_deref() == Some("host") {
        // The name is the other container's, or the host's.
        body.hostname = None;
        body.domainname = None;
    }
    body.image = Some(image.to_owned());
    body.networking_config = first.map(|(name, endpoint)| NetworkingConfig {
        endpoints_config: Some(HashMap::from([(name, endpoint)])),
    });
    body.host_config = Some(host);
    Recipe { body, networks }
}

/// The container's own part of its configuration.
fn own(config: ContainerConfig, image: &ImageConfig, short_id: &str) -> ContainerCreateBody {
    let entrypoint_is_images = config.entrypoint == image.entrypoint;
    let cmd_is_images = entrypoint_is_images && config.cmd == image.cmd;
    ContainerCreateBody {
        hostname: config.hostname.filter(|name| name != short_id),
        domainname: config.domainname,
        user: None,
        attach_stdin: config.attach_stdin,
        attach_stdout: config.attach_stdout,
        attach_stderr: config.attach_stderr,
        exposed_ports: config.exposed_ports.map(|ports| without(ports, image.exposed_ports.as_deref())),
        tty: config.tty,
        open_stdin: config.open_stdin,
        stdin_once: config.stdin_once,
        env: config.env.map(|env| without(env, image.env.as_deref())),
        cmd: config.cmd.filter(|_| !cmd_is_images),
        healthcheck: other_than(config.healthcheck, image.healthcheck.as_ref()),
        args_escaped: None,
        image: None,
        volumes: config.volumes.map(|volumes| without(volumes, image.volumes.as_deref())),
        working_dir: other_than(config.working_dir, image.working_dir.as_ref()),
        entrypoint: config.entrypoint.filter(|_| !entrypoint_is_images),
        network_disabled: config.network_disabled,
        on_build: None,
        labels: config.labels.map(|mut labels| {
            labels.retain(|name, value| {
                image.labels.as_ref().and_then(|labels| labels.get(name)) != Some(value)
            });
            labels
        }),
        stop_signal: other_than(config.stop_signal, image.stop_signal.as_ref()),
        stop_timeout: config.stop_timeout,
        shell: None,
        host_config: None,
        networking_config: None,
    }
}

fn other_than<T: PartialEq>(own: Option<T>, image: Option<&T>) -> Option<T> {
    own.filter(|own| image != Some(own))
}

fn without(mut own: Vec<String>, image: Option<&[String]>) -> Vec<String> {
    own.retain(|entry| !image.is_some_and(|image| image.contains(entry)));
    own
}

/// Names the volumes that have none of their own.
fn keep_volumes(host: &mut HostConfig, mounted: &[MountPoint]) {
    for mount in mounted.iter().filter(|mount| mount.typ.as_deref() == Some("volume")) {
        let (Some(volume), Some(place)) = (&mount.name, &mount.destination) else { continue };
        let asked = host.mounts.iter_mut().flatten().find(|asked| asked.target.as_ref() == Some(place));
        if let Some(asked) = asked {
            asked.source = Some(volume.clone());
            continue;
        }
        let at_place = |bind: &String| bind.split(':').nth(1) == Some(place);
        let binds = host.binds.get_or_insert_default();
        if !binds.iter().any(at_place) {
            let mode = if mount.rw == Some(false) { ":ro" } else { "" };
            binds.push(format!("{volume}:{place}{mode}"));
        }
    }
}

/// The network that the container is created on, and the others.
#[expect(clippy::type_complexity, reason = "one pair is the first of many such pairs")]
fn networks(
    mode: &str,
    told: HashMap<String, EndpointSettings>,
    short_id: &str,
) -> (Option<(String, EndpointSettings)>, Vec<(String, EndpointSettings)>) {
    // Podman's ways of giving a container the host's outbound network without one of its own may carry options.
    let outbound = ["slirp4netns", "pasta", "private"].contains(&mode.split(':').next().unwrap_or_default());
    if mode == "host" || mode == "none" || mode.starts_with("container:") || outbound {
        return (None, Vec::new());
    }
    let mut rest: Vec<(String, EndpointSettings)> = told
        .into_iter()
        .map(|(name, endpoint)| {
            let aliases = endpoint.aliases.map(|mut aliases| {
                aliases.retain(|alias| alias != short_id);
                aliases
            });
            let asked = EndpointSettings {
                ipam_config: endpoint.ipam_config,
                links: endpoint.links,
                aliases: aliases.filter(|aliases| !aliases.is_empty()),
                driver_opts: endpoint.driver_opts,
                gw_priority: endpoint.gw_priority.filter(|priority| *priority != 0),
                ..EndpointSettings::default()
            };
            (name, asked)
        })
        .collect();
    rest.sort_by(|(one, _), (other, _)| one.cmp(other));
    let wanted = if mode == "default" { "bridge" } else { mode };
    let first = rest.iter().position(|(name, _)| name == wanted).map(|at| rest.remove(at));
    (first, rest)
}

#[cfg(test)]
#[path = "recipe_tests.rs"]
mod tests;
