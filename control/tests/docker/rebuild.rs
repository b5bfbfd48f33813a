//! A container that rebuilds itself: each attempt to gain privileges through the new image.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::PathBuf;

use landfall::docker::rebuild::{UserOfRebuild, own_image};
use serde_json::Value;

use super::start::Shop;
use super::{BASE, Built, Container, docker, engine, run, wait_until};

/// Images that a test built. They are removed at its end.
struct Images(Vec<String>);

impl Drop for Images {
    fn drop(&mut self) {
        for image in &self.0 {
            run(&["rmi", "-f", image]);
        }
    }
}

impl Images {
    /// Builds an image in a temporary folder.
    fn build(&mut self, name: &str, dockerfile: &str, files: &[(&str, &str)]) -> String {
        let image = format!("lf-{}-{name}:1", std::process::id());
        let folder = tempfile::tempdir().unwrap();
        for (file, text) in [("Dockerfile", dockerfile)].iter().chain(files) {
            std::fs::write(folder.path().join(file), text).unwrap();
        }
        docker(&["build", "-q", "-t", &image, folder.path().to_str().unwrap()]);
        self.0.push(image.clone());
        image
    }
}

fn id_of(image: &str) -> Option<String> {
    let found = run(&["image", "inspect", "-f", "{{.Id}}", image]);
    found.status.success().then(|| String::from_utf8(found.stdout).unwrap())
}

/// A container of an image that other projects share and that runs as `app`, and the image of another project.
struct Victim {
    shop: Shop,
    shared: String,
    other: String,
    _images: Images,
}

/// The accounts of the first image, and those of a hostile image: the same name with uid 0, root without a password.
const PASSWD: &str = "root:x:0:0::/:/bin/sh\napp:x:3001:3002::/:/bin/sh\n";
const EVIL_PASSWD: &str = "root::0:0::/:/bin/sh\napp:x:0:0::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\napp:x:3002:\n";

/// Waits until it is stopped.
const WAIT: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

/// Leaves a set-uid copy of a program in the folder that is mounted from the host.
const LEAVE: &str = "busybox mkdir -p /workspaces/NAME/left; busybox cp /bin/busybox /workspaces/NAME/left/suid; \
    busybox chmod 4755 /workspaces/NAME/left/suid; trap 'exit 0' TERM; sleep 100000 & wait";

impl Victim {
    fn new(name: &str) -> Victim {
        let mut images = Images(Vec::new());
        let accounts = [("passwd", PASSWD), ("group", GROUP)];
        let dockerfile = format!(
            "FROM {BASE}\nLABEL case={name}\nCOPY passwd group /etc/\nUSER app\nCMD [\"sh\", \"-c\", \"{WAIT}\"]\n"
        );
        let shared = images.build(&format!("{name}-shared"), &dockerfile, &accounts);
        let secret = format!("FROM {BASE}\nLABEL case={name}\nCOPY secret /secret\n");
        let other = images.build(&format!("{name}-other"), &secret, &[("secret", "of another project")]);
        Victim { shop: Shop::new(name, "sleep 100000"), shared, other, _images: images }
    }

    /// Starts the container, and then changes its folder as the container could.
    fn start(&self, options: &[&str]) {
        let shop = &self.shop;
        shop.stdout_of(&[&["start", "--image", &self.shared], options].concat());
        std::fs::set_permissions(shop.folder(), PermissionsExt::from_mode(0o777)).unwrap();
        shop.write("passwd", EVIL_PASSWD);
        shop.write("group", "root:x:0:\napp:x:0:\n");
        let other = &self.other;
        let leave = LEAVE.replace("NAME", &shop.name);
        let dockerfile = format!(
            "FROM {BASE}\nUSER 0\nCOPY --from={other} /secret /stolen\nCOPY passwd group /etc/\n\
             RUN [\"busybox\", \"cp\", \"/bin/busybox\", \"/su\"]\nRUN [\"busybox\", \"chmod\", \"4755\", \"/su\"]\n\
             CMD [\"sh\", \"-c\", \"{leave}\"]\n"
        );
        shop.write("Dockerfile", &dockerfile);
    }

    fn inspect(&self, format: &str) -> String {
        docker(&["inspect", "--type", "container", "-f", format, &self.shop.name])
    }

    /// Requests a rebuild from inside, and returns the answer.
    fn ask(&self) -> Value {
        let output = self.shop.ask(true, "$LANDFALL_HOSTD_TOKEN");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
    }

    fn image(&self) -> String {
        format!("landfall-{}", self.shop.name)
    }

    /// Waits until a container of a new image has replaced the one of this id, and the old one is removed.
    fn wait_for_another(&self, id: &str) {
        let aside = format!("{}.landfall-old", self.shop.name);
        wait_until("the new container", || {
            let now = run(&["inspect", "-f", "{{.Id}} {{.State.Running}}", &self.shop.name]).stdout;
            let now = String::from_utf8(now).unwrap();
            let is_back = now.contains("true") && !now.starts_with(id);
            (is_back && !run(&["inspect", &aside]).status.success()).then_some(())
        });
    }

    fn left(&self) -> PathBuf {
        self.shop.folder().join("left/suid")
    }
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn c23_without_the_right_no_image_is_built_or_read() {
    let victim = Victim::new("unasked");
    victim.start(&[]);
    let (id, shared) = (victim.inspect("{{.Id}} {{.State.StartedAt}}"), id_of(&victim.shared));
    let answer = victim.ask();
    let reason = answer["reason"].as_str().unwrap_or_default();
    assert!(answer["ok"] == false && reason.starts_with("not granted: rebuild"), "{answer}");
    assert_eq!((victim.inspect("{{.Id}} {{.State.StartedAt}}"), id_of(&victim.shared)), (id, shared));
    assert_eq!(id_of(&victim.image()), None);
    let stolen = run(&["exec", &victim.shop.name, "cat", "/stolen"]);
    assert!(!stolen.status.success(), "{stolen:?}");
}

#[test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
fn c23_a_rebuild_replaces_no_shared_image_and_grants_no_root() {
    let victim = Victim::new("granted");
    let shop = &victim.shop;
    victim.start(&["--allow-rebuild"]);
    assert!(shop.stdout_of(&["status", &shop.name]).contains("grants   rebuild"));
    let (id, shared) = (victim.inspect("{{.Id}}"), id_of(&victim.shared));
    let answer = victim.ask();
    assert_eq!(answer["ok"], true, "{answer}");
    victim.wait_for_another(&id);
    assert_eq!(id_of(&victim.shared), shared, "the image of other containers was replaced");
    assert_eq!(victim.inspect("{{.Config.Image}} {{.Config.User}}"), format!("{} 3001:3002", victim.image()));
    // The program of the new image runs, as the user of the old one.
    wait_until("the program to leave its copy", || victim.left().exists().then_some(()));
    let left = std::fs::metadata(victim.left()).unwrap();
    assert_eq!((left.uid(), left.gid()), (3001, 3002), "root's set-uid file was left on the host");
    let ids = docker(&["exec", &shop.name, "busybox", "id"]);
    assert!(ids.contains("uid=3001") && ids.contains("gid=3002") && !ids.contains("groups=0"), "{ids}");
    // The set-uid program of the new image gains no privileges.
    assert!(docker(&["exec", &shop.name, "busybox", "ls", "-l", "/su"]).starts_with("-rws"));
    let su = run(&["exec", &shop.name, "/su", "root", "-c", "busybox id -u"]);
    assert_ne!(String::from_utf8_lossy(&su.stdout).trim(), "0", "{su:?}");

    // A rebuild by the host's user takes the user of the new image.
    shop.write("Dockerfile", &format!("FROM {BASE}\nUSER 7:8\nCMD [\"sleep\", \"100000\"]\n"));
    shop.stdout_of(&["restart", &shop.name, "--build"]);
    assert_eq!(docker(&["exec", &shop.name, "busybox", "id", "-u"]), "7");
}

/// Runs a container as with `docker run`, with its own accounts, and prepares a hostile image of its folder.
fn by_hand(name: &str, options: &[&str]) -> (Built, Container) {
    let dockerfile = format!("FROM {BASE}\nCOPY passwd group /etc/\nCMD [\"sleep\", \"100000\"]\n");
    let built = Built::with_files(name, &dockerfile, &[("passwd", PASSWD), ("group", GROUP)]);
    let container = Container::run(name, &[&["--stop-timeout", "0"], options].concat(), &built.image, &[]);
    std::fs::write(built.path().join("passwd"), EVIL_PASSWD).unwrap();
    built.dockerfile(&format!(
        "FROM {BASE}\nCOPY passwd group /etc/\nUSER 3001:3002\nVOLUME /workspaces /data\nCMD [\"sleep\", \"100000\"]\n"
    ));
    (built, container)
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn c23_the_configuration_of_a_foreign_container_is_recorded_at_its_first_rebuild() {
    let mounted = tempfile::tempdir().unwrap();
    let mount = format!("{}:/data:ro", mounted.path().display());
    let options = [
        "--user",
        "app:app",
        "--group-add",
        "app",
        "--cap-drop",
        "ALL",
        "--cap-add",
        "CHOWN",
        "--security-opt",
        "no-new-privileges",
        "--read-only",
        "--pids-limit",
        "64",
        "--memory",
        "64m",
        "--cpus",
        "0.5",
        "-v",
        &mount,
        "--label",
        "dev.landfall.deny=5432",
    ];
    let (built, container) = by_hand("recorded", &options);
    let kept = "{{.HostConfig.CapDrop}} {{.HostConfig.CapAdd}} {{.HostConfig.SecurityOpt}} {{.HostConfig.ReadonlyRootfs}} \
        {{.HostConfig.PidsLimit}} {{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.Binds}} \
        {{index .Config.Labels \"dev.landfall.deny\"}}";
    let before = container.inspect(kept);
    engine().rebuild(&container.0, built.path(), UserOfRebuild::Recorded).await.unwrap();
    assert_eq!(container.inspect(kept), before);
    assert_eq!(container.inspect("{{.Config.User}} {{.HostConfig.GroupAdd}}"), "3001:3002 [3002]");
    assert_eq!(container.exec("busybox id -u; busybox id -g"), "3001\n3002");
    assert!(
        !run(&["exec", container.0.as_str(), "touch", "/data/x"]).status.success(),
        "the mount is read-only"
    );

    // The container keeps the user of its first `docker run`, although an image named the pinned user.
    std::fs::write(built.path().join("passwd"), PASSWD).unwrap();
    built.dockerfile(&format!("FROM {BASE}\nCOPY passwd group /etc/\nUSER 0\nCMD [\"sleep\", \"100000\"]\n"));
    engine().rebuild(&container.0, built.path(), UserOfRebuild::Images).await.unwrap();
    assert_eq!(container.inspect("{{.Config.User}}"), "app:app");
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn c23_an_image_with_forged_labels_is_not_used() {
    let options = ["--user", "3001:3002", "--label", "dev.landfall.deny=5432"];
    let (built, container) = by_hand("forged", &options);
    let id = container.id();
    for (label, expected) in [
        ("dev.landfall.user=", "dev.landfall.user is reserved"),
        ("dev.landfall.deny=5432", "its label dev.landfall.deny repeats a label"),
    ] {
        built.dockerfile(&format!("FROM {BASE}\nLABEL {label}\nCMD [\"sleep\", \"100000\"]\n"));
        let rebuilt = engine().rebuild(&container.0, built.path(), UserOfRebuild::Recorded).await;
        let error = rebuilt.unwrap_err().to_string();
        assert!(
            error.starts_with("start failed: the new image is not used: ") && error.contains(expected),
            "{error}"
        );
        assert_eq!(
            (container.id(), container.inspect("{{.State.Running}}")),
            (id.clone(), "true".to_owned())
        );
        assert_eq!(id_of(&own_image(&container.0)), None, "the image remains");
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine: tests/docker.sh"]
async fn c23_an_oversized_folder_is_refused_before_the_build() {
    let (built, container) = by_hand("sparse", &[]);
    let id = container.id();
    std::fs::File::create(built.path().join("sparse")).unwrap().set_len(1 << 40).unwrap();
    let error = engine().rebuild(&container.0, built.path(), UserOfRebuild::Recorded).await.unwrap_err();
    let expected = "start failed: the folder of the build has more than 1.0 GiB: sparse has 1.0 TiB";
    assert_eq!(error.to_string(), expected);
    assert_eq!((container.id(), id_of(&own_image(&container.0))), (id, None));
    let small = engine().with_context_bytes_max(1_024);
    std::fs::remove_file(built.path().join("sparse")).unwrap();
    let error = small.rebuild(&container.0, built.path(), UserOfRebuild::Recorded).await.unwrap_err();
    assert!(error.to_string().contains("more than 1.0 KiB"), "{error}");
}
