//! Rootless Podman: the containers of an unprivileged user, discovered through the socket of that user's own engine.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use landfall_tests::case::Case;
use landfall_tests::process::private_mounts;
use landfall_tests::{Home, note};
use tempfile::TempDir;

use super::engine::{LABEL, answers, images_directory, refuses, until};

pub(crate) const CASES: &[Case] = &[Case::once("rootless_podman_works_like_docker", podman)];

/// A user without privileges. The account exists for this case only: in files that are mounted over those of the machine, in
/// the case's own mount namespace.
struct Person {
    directory: TempDir,
}

impl Person {
    const ID: u32 = 54_321;

    fn new() -> Person {
        private_mounts();
        let directory = tempfile::Builder::new().prefix("landfall-podman-").tempdir().unwrap();
        let person = Person { directory };
        std::fs::set_permissions(person.directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        for name in ["home", "home/.config", "home/.config/containers", "run", "run/podman"] {
            let path = person.path(name);
            std::fs::create_dir(&path).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
            chown(&path, Some(Person::ID), Some(Person::ID)).unwrap();
        }
        // No journal and no systemd are needed.
        let settings =
            "[engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n";
        std::fs::write(person.path("home/.config/containers/containers.conf"), settings).unwrap();
        let (id, home) = (Person::ID, person.path("home"));
        person.mount_over("/etc/passwd", &format!("landfall-test:x:{id}:{id}::{}:/bin/sh\n", home.display()));
        person.mount_over("/etc/group", &format!("landfall-test:x:{id}:\n"));
        person.mount_over("/etc/subuid", "landfall-test:1000000:65536\n");
        person.mount_over("/etc/subgid", "landfall-test:1000000:65536\n");
        std::fs::copy(Home::program(), person.path("landfall")).unwrap();
        std::fs::copy(images_directory().join("base.tar"), person.path("base.tar")).unwrap();
        std::fs::set_permissions(person.path("base.tar"), PermissionsExt::from_mode(0o644)).unwrap();
        person
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Adds a line to a file of the machine, for this case only.
    fn mount_over(&self, path: &str, line: &str) {
        let mine = self.path(&path.replace('/', "-"));
        let there = std::fs::read_to_string(path).unwrap_or_default();
        std::fs::write(&mine, there + line).unwrap();
        std::fs::set_permissions(&mine, PermissionsExt::from_mode(0o644)).unwrap();
        let status = Command::new("mount").arg("--bind").arg(&mine).arg(path).status().unwrap();
        assert!(status.success(), "{path} cannot be mounted over");
    }

    /// A program that runs as this user, without variables in its environment that select other directories.
    fn command(&self, program: &str) -> Command {
        let id = Person::ID.to_string();
        let mut command = Command::new("setpriv");
        command
            .args([
                "--reuid",
                &id,
                "--regid",
                &id,
                "--clear-groups",
                "--inh-caps=-all",
                "--pdeathsig",
                "KILL",
            ])
            .arg(program)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env("HOME", self.path("home"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .current_dir(self.path("home"))
            .stdin(Stdio::null());
        command
    }

    fn try_run(&self, program: &str, arguments: &[&str]) -> Output {
        self.command(program).args(arguments).output().unwrap()
    }

    #[track_caller]
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.try_run(program, arguments);
        let wrong = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments:?}: {}: {wrong}", output.status);
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    #[track_caller]
    fn landfall(&self, arguments: &[&str]) -> String {
        self.run(self.path("landfall").to_str().unwrap(), arguments)
    }

    #[track_caller]
    fn serve(&self, name: &str, port: u16, options: &[&str]) {
        self.serve_from("base", name, port, options);
    }

    #[track_caller]
    fn serve_from(&self, image: &str, name: &str, port: u16, options: &[&str]) {
        let script = format!(
            "mkdir -p /www; echo {name} >/www/index.html; exec busybox httpd -f -p 127.0.0.1:{port} -h /www"
        );
        let head = ["run", "-d", "--name", name, "--network", "none"];
        self.run("podman", &[&head[..], options, &[image, "sh", "-c", &script]].concat());
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for arguments in [&["ls"][..], &["status"], &["doctor"], &["logs"]] {
                let printed = self.try_run(self.path("landfall").to_str().unwrap(), arguments);
                note!(
                    "{arguments:?}: {}",
                    String::from_utf8_lossy(&[printed.stdout, printed.stderr].concat())
                );
            }
        }
        self.try_run("podman", &["rm", "-f", "-a", "-t", "0"]);
    }
}

fn podman() {
    // Reaps the orphans of the processes that are started here.
    let _home = Home::new();
    let person = Person::new();
    let tar = person.path("base.tar");
    let imported = person.try_run("podman", &["import", "-q", tar.to_str().unwrap(), "base"]);
    let tried = person.try_run("podman", &["run", "--rm", "--network", "none", "base", "echo", "it runs"]);
    if String::from_utf8_lossy(&tried.stdout).trim() != "it runs" {
        let wrong = [imported.stderr, tried.stderr].concat();
        note!(
            "SKIPPED: Podman runs no container without root here: {}",
            String::from_utf8_lossy(&wrong).trim()
        );
        return;
    }
    let socket = person.path("run/podman/podman.sock");
    let address = format!("unix://{}", socket.display());
    let mut service = person.command("podman");
    let mut service = service.args(["system", "service", "-t", "0", &address]).spawn().unwrap();
    until("Podman's socket", || if socket.exists() { Ok(()) } else { Err(service.try_wait()) });

    // The location of the engine is not configured.
    person.landfall(&["up"]);
    person.serve("web", 3000, &["--label", LABEL]);
    answers(3000, "web");
    person.run("podman", &["restart", "-t", "0", "web"]);
    answers(3000, "web");
    person.run("podman", &["kill", "web"]);
    refuses(3000);
    person.run("podman", &["start", "web"]);
    answers(3000, "web");
    // Labels of an image grant nothing.
    let label = format!("LABEL {LABEL}");
    person.run("podman", &["import", "-q", "--change", &label, tar.to_str().unwrap(), "hostile"]);
    person.serve_from("hostile", "hostile", 3002, &[]);
    person.serve("plain", 3001, &[]);
    person.landfall(&["attach", "plain"]);
    answers(3001, "plain");
    let reported = person.landfall(&["ls", "--all"]);
    assert!(reported.contains("label comes from the image"), "{reported}");
    person.run("podman", &["rm", "-f", "-t", "0", "web"]);
    refuses(3000);
    answers(3001, "plain");
    person.landfall(&["down"]);
    refuses(3001);
    service.kill().unwrap();
    service.wait().unwrap();
}
