// Search without a server: browsers start no worker from a page that is opened as a file, so there the search's worker
// runs in a hidden frame. Its scripts come from the site, too.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      this.started = new Promise((resolve, reject) => {
        const frame = document.createElement("iframe")
        frame.hidden = true
        frame.srcdoc = "<!doctype html><title>search</title>"
        frame.onload = () => {
          const script = frame.contentDocument.createElement("script")
          frame.contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
          script.src = address
          script.onload = () => resolve(frame.contentWindow)
          script.onerror = reject
          frame.contentDocument.body.append(script)
        }
        document.body.append(frame)
      })
    }

    async postMessage(data) {
      const inner = await this.started
      inner.dispatchEvent(new inner.MessageEvent("message", { data }))
    }

    terminate() {}
  }
}
