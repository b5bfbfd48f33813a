//! Making a container that was not there, and taking it away.

use std::collections::HashMap;

use super::models::{ContainerCreateBody, HostConfig, Mount, MountType, PortBinding};
use super::{
    ContainerActions, CreateContainerOptionsBuilder, DockerError, Engine, Error, NewContainer,
    StartContainerOptions, replace,
};
use crate::docker::rebuild::USER_LABEL;

/// How long a container has to end by itself, in seconds. As the first process of its namespace a dev server gets no signal
/// that it did not ask for, so most of them take all of it, and a restart is to take moments.
const STOP_SECONDS: i64 = 3;

/// The security option that keeps a process from gaining privileges by a set-uid program (`prctl(2)`,
/// `PR_SET_NO_NEW_PRIVS`).
const NO_NEW_PRIVILEGES: &str = "no-new-privileges";

impl Engine {
    /// Makes the container and starts it, and sees that it stays. One that does not is removed.
    pub(in crate::docker) async fn run(&self, new: &NewContainer) -> Result<(), DockerError> {
        let name = new.name.as_str();
        let options = CreateContainerOptionsBuilder::default().name(name).build();
        let created = self.client.create_container(Some(options), body(new)).await;
        created.map_err(|error| self.refused(&error))?;
        let started = self.client.start_container(name, None::<StartContainerOptions>).await;
        let up = match started.map_err(|error| self.error(name, &error)) {
            Ok(()) => self.stays(name).await,
            Err(error) => Err(error),
        };
        if up.is_err() {
            // Under its name nothing else could be started.
            let _ = self.remove(name).await;
        }
        up
    }

    /// The labels of an image, which is pulled if it is not here.
    pub(in crate::docker) async fn image_labels(
        &self,
        image: &str,
    ) -> Result<HashMap<String, String>, DockerError> {
        let told = match self.client.inspect_image(image).await {
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => {
                self.pull(image).await?;
                self.client.inspect_image(image).await
            }
            told => told,
        };
        let told = told.map_err(|error| self.refused(&error))?;
        Ok(told.config.and_then(|config| config.labels).unwrap_or_default())
    }

    /// Stops the container in its own time and removes it, with what an attempt to replace it left. Its volumes are kept.
    pub(in crate::docker) async fn take_away(&self, name: &str) -> Result<bool, DockerError> {
        let aside = replace::aside(name);
        let mut was_there = false;
        for name in [name, &aside] {
            if self.inspect(name).await?.is_some() {
                was_there = true;
                self.stop(name).await?;
                self.remove(name).await?;
            }
        }
        Ok(was_there)
    }
}

fn body(new: &NewContainer) -> ContainerCreateBody {
    let inside = format!("{}/tcp", new.published);
    // Docker chooses a free host port if the request names none.
    let binding = PortBinding { host_ip: Some("127.0.0.1".to_owned()), host_port: Some(String::new()) };
    let folder = Mount {
        typ: Some(MountType::BIND),
        source: Some(new.folder.0.clone()),
        target: Some(new.folder.1.clone()),
        ..Mount::default()
    };
    let http = Mount {
        typ: Some(MountType::BIND),
        source: Some(new.http_directory.0.clone()),
        target: Some(new.http_directory.1.clone()),
        read_only: Some(true),
        ..Mount::default()
    };
    let mut labels: HashMap<String, String> = new.labels.clone().into_iter().collect();
    // The user is the image's.
    labels.insert(USER_LABEL.to_owned(), String::new());
    ContainerCreateBody {
        image: Some(new.image.clone()),
        env: Some(new.environment.iter().map(|(name, value)| format!("{name}={value}")).collect()),
        exposed_ports: Some(vec![inside.clone()]),
        labels: Some(labels),
        stop_timeout: Some(STOP_SECONDS),
        host_config: Some(HostConfig {
            mounts: Some(vec![folder, http]),
            port_bindings: Some(HashMap::from([(inside, Some(vec![binding]))])),
            // A set-uid program of the image, which a rebuild may bring, makes no process root.
            security_opt: Some(vec![NO_NEW_PRIVILEGES.to_owned()]),
            extra_hosts: Some(vec!["host.docker.internal:host-gateway".to_owned()]),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}
